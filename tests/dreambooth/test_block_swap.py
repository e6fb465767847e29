"""Swapped blocks: the same training, and no use of a weight that is away, which is poisoned here.

A dropped copy is overwritten (NaN, or 255 in packed 4-bit weights), so that an alias of it shows.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.quantizers.bitsandbytes import bnb_quantizer
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn

from nara_diffusion import NaraConfig
from nara_diffusion.dreambooth import train
from nara_diffusion.dreambooth.denoiser import AdaptedDenoiser
from nara_diffusion.dreambooth.families import SD3
from nara_diffusion.dreambooth.flow_families import FLUX
from nara_diffusion.dreambooth.image_arguments import DreamBoothArguments
from nara_diffusion.dreambooth.pipelines import load_pipeline, modules_of, sharing_pipeline
from nara_diffusion.dreambooth.placement import SWAPS, Swap, chosen_blocks, place_denoisers, swappable
from tests.acceptance._commands import fresh_accelerate
from tests.acceptance._runs import image_arguments, image_flags
from tests.helpers.pipelines.families import FAMILY_PIPELINES
from tests.helpers.small_pipelines import pixels, small_sd3, small_sdxl, wide_flux

CPU = torch.device("cpu")
TARGETS = ["attn.to_q", "ff.net.2", "proj_mlp"]
COMMON: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": TARGETS, "lora_dropout": 0.1}
ADAPTERS = {
    "nara": lambda: NaraConfig(core_init="kaiming", **COMMON),
    "nara_dora": lambda: NaraConfig(core_init="kaiming", use_dora=True, **COMMON),
    "lora": lambda: LoraConfig(**COMMON),
}


@pytest.fixture(autouse=True)
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is loaded and run, in order; copies are poisoned as they are dropped."""
    events: list[str] = []
    load, free, enter = Swap.load, Swap.free, Swap.enter

    def logged_load(swap: Swap, number: int) -> None:
        if number not in swap.copied and 0 <= number < swap.count:
            events.append(f"load {number}")
        load(swap, number)

    def poisoned_free(swap: Swap, numbers: Iterable[int]) -> None:
        numbers = list(numbers)
        for number in swap.copied.keys() & numbers:
            for parameter, _ in swap.weights[number]:
                parameter.data.fill_(torch.nan if parameter.is_floating_point() else 255)
            events.append(f"free {number}")
        free(swap, numbers)

    def logged_enter(swap: Swap, number: int, *inputs: Any) -> None:
        enter(swap, number, *inputs)
        events.append(f"run {number}")

    monkeypatch.setattr(Swap, "load", logged_load)
    monkeypatch.setattr(Swap, "free", poisoned_free)
    monkeypatch.setattr(Swap, "enter", logged_enter)
    return events


def frozen(pipe: Any) -> Any:
    for module in modules_of(pipe).values():
        module.requires_grad_(False)
    return pipe


def swapped(*pipes: Any, count: int) -> Swap:
    place_denoisers(pipes, FLUX, count, CPU)
    return SWAPS[pipes[0].transformer]


def trained(pipe: Any, name: str, width: int) -> dict[str, Tensor]:
    """The adapter after three optimizer steps of two forwards each."""
    torch.manual_seed(1)
    model = AdaptedDenoiser(pipe, ADAPTERS[name](), gradient_checkpointing=True).train()
    optimizer = torch.optim.AdamW(model.trained.values(), lr=1e-3)
    draw = torch.Generator().manual_seed(0)
    for _ in range(3):
        for _ in range(2):
            embeddings = (torch.randn(2, 5, width, generator=draw), torch.randn(2, 16, generator=draw))
            sample, timestep = torch.randn(2, 4, 8, 8, generator=draw), torch.tensor([200.0, 900.0])
            output = model(sample, timestep, torch.zeros(2, 6), embeddings=embeddings)
            (output - sample).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {key: parameter.detach() for key, parameter in model.trained.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-6)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "count"),
    [("nara_dora", 6), *(pytest.param(*row, marks=SLOW) for row in (("nara", 2), ("nara_dora", 2), ("lora", 4)))],
)
def test_three_steps_equal_those_of_the_whole_model(name: str, count: int) -> None:
    expected = trained(frozen(wide_flux()), name, 64)
    pipe = frozen(wide_flux())
    swapped(pipe, count=count)
    assert_same(trained(pipe, name, 64), expected)


@pytest.mark.slow
def test_three_steps_in_4_bits_equal_unswapped_ones(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(bnb_quantizer.BnB4BitDiffusersQuantizer, "validate_environment", lambda *_, **__: None)
    wide_flux().save_pretrained(tmp_path)
    pipes = [load_pipeline(str(tmp_path), dtype=torch.float32, bits=4, device=CPU) for _ in range(2)]
    swapped(pipes[1], count=5)
    assert_same(trained(pipes[1], "nara_dora", 64), trained(pipes[0], "nara_dora", 64))


def test_next_block_is_requested_before_this_one_runs(log: list[str]) -> None:
    pipe = frozen(wide_flux())
    swap = swapped(pipe, count=3)
    model = AdaptedDenoiser(pipe, ADAPTERS["lora"](), gradient_checkpointing=True).train()
    log.clear()
    embeddings = (torch.randn(1, 5, 64), torch.randn(1, 16))
    model(torch.randn(1, 4, 8, 8), torch.tensor([200.0]), torch.zeros(1, 6), embeddings=embeddings).sum().backward()
    forward = ["load 0", "load 1", "run 0", "free 0", "load 2", "run 1", "free 1", "run 2"]
    backward = ["load 1", "run 2", "free 2", "load 0", "run 1", "free 1", "run 0"]
    assert log == forward + backward
    assert list(swap.copied) == [0]  # the next forward begins with it
    blocks = chosen_blocks(pipe.transformer, 3)
    assert all(p.numel() == 0 for block in blocks[1:] for p in parameters_of(block))


def test_denoisers_of_both_pipelines_move_with_their_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sharing pipeline has the other's parameters, and buffers of its own, such as positions."""
    pipe = frozen(small_sd3())
    sampling: Any = sharing_pipeline(pipe, torch.float32)
    moved: list[Any] = []
    monkeypatch.setattr(nn.Module, "to", lambda module, device: moved.append((module, device)))
    place_denoisers((pipe, sampling), SD3, 0, torch.device("meta"))
    assert moved == [(pipe.transformer, torch.device("meta")), (sampling.transformer, torch.device("meta"))]


def parameters_of(block: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in block.named_parameters() if "lora_" not in name]


def test_samples_of_a_sharing_pipeline_are_the_same() -> None:
    expected = pixels(frozen(wide_flux()))
    pipe = frozen(wide_flux())
    sampling = sharing_pipeline(pipe, torch.float32)
    swapped(pipe, sampling, count=4)
    assert torch.equal(pixels(sampling), expected)
    assert torch.equal(pixels(pipe), expected)


@pytest.mark.slow
def test_run_with_swapped_blocks_writes_the_same_adapter(tmp_path: Path) -> None:
    pipe = small_sdxl(layers_per_block=2)
    flags = image_flags(tmp_path, pipe) | {
        "max_train_steps": 3,
        "validation_steps": 2,
        "curve_points": 1,
        "learning_rate": 1e-3,
    }
    files = []
    for count in (0, 3):
        fresh_accelerate()
        folder = tmp_path / f"swap-{count}"
        train.main(image_arguments(flags, folder, gradient_checkpointing=True, block_swap=count))
        files.append(load_file(folder / "pytorch_nara_weights.safetensors"))
    assert_same(files[1], files[0])


@pytest.mark.parametrize("name", ["sdxl", "sd3", "qwen_image", "wan", "z_image", "flux2"])
def test_every_family_has_blocks_to_swap(name: str) -> None:
    pipe = FAMILY_PIPELINES[name]()
    denoiser = pipe.unet if name == "sdxl" else pipe.transformer
    blocks = swappable(denoiser)
    assert blocks
    with pytest.raises(ValueError, match=f"block_swap is {len(blocks) + 1}, but the model has {len(blocks)} blocks"):
        chosen_blocks(denoiser, len(blocks) + 1)


@pytest.mark.parametrize("flags", [{}, {"gradient_checkpointing": True, "load_in_8bit": True}])
def test_swap_without_checkpointing_or_in_8bit_is_refused(flags: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="block_swap is 3: it needs gradient_checkpointing, and can't be used with"):
        DreamBoothArguments(pretrained_model_name_or_path="none", instance_data_dir="none", block_swap=3, **flags)


@pytest.mark.parametrize("count", [1, 2])
def test_swap_of_too_few_blocks_is_refused(count: int) -> None:
    """The planned weights are those of a run without it."""
    flags: dict[str, Any] = {"pretrained_model_name_or_path": "none", "instance_data_dir": "none"}
    with pytest.raises(ValueError, match=f"block_swap is {count}, which frees nothing: .* Give at least 3") as error:
        DreamBoothArguments(**flags, block_swap=count, gradient_checkpointing=True)
    assert "\n" not in str(error.value)


@pytest.mark.gpu
def test_streams_copy_what_blocks_run_with() -> None:
    """Not run yet: no GPU was at hand."""
    device = torch.device("cuda", 0)
    results = []
    for count in (0, 4):
        pipe = frozen(wide_flux())
        if count:
            place_denoisers((pipe,), FLUX, count, device)
        pipe.to(device)
        results.append(pixels(pipe))
    torch.testing.assert_close(*results, rtol=0, atol=1e-4)
