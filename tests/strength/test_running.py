"""Strengths in gradient checkpointing, compiled graphs, offload, threads and expanded batches."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from nara_diffusion import StrengthSchedule, noise_level, set_strength
from tests.helpers.adapted import TwoLayers, disturb, lora_config, nara_config, relative_error
from tests.helpers.denoisers.models import denoiser, inputs_of, sample_of, tensor_of
from tests.helpers.small_pipelines import small_unet
from tests.strength.models import LEVELS, SCHEDULE, adapted_by, set_number, strength_by_hand

TARGETS = ["to_q", "to_out.0", "proj_in", "conv1", "time_emb_proj"]
TIMESTEPS = (torch.tensor([950, 30]), torch.tensor([200, 700]))
CONFIGS = {
    "LoRA": lora_config,
    "DoRA": partial(lora_config, use_dora=True),
    "NaRA": nara_config,
}
ALL = pytest.mark.parametrize("kind", CONFIGS)


def unet(kind: str, schedule: StrengthSchedule | None = SCHEDULE) -> Any:
    model = small_unet(16)
    model.requires_grad_(False)
    torch.manual_seed(1)
    model.add_adapter(CONFIGS[kind](target_modules=TARGETS))
    disturb(model)
    if schedule is not None:
        set_strength(model, "default", schedule)
    return model.train()


def call(model: Any, timesteps: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(int(timesteps.sum()))
    batch = len(timesteps)
    sample = torch.randn(batch, 4, 8, 8, generator=generator).requires_grad_()
    return model(sample, timesteps, torch.randn(batch, 5, 16, generator=generator), return_dict=False)[0]


def gradients(model: Any) -> dict[str, Tensor]:
    """Of two forwards at different timesteps, one a sample, and one backward pass."""
    model.zero_grad()
    (call(model, TIMESTEPS[0]).square().mean() + 0.7 * call(model, TIMESTEPS[1]).square().mean()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@ALL
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_blocks_recompute_at_their_own_strength(kind, use_reentrant):
    expected = gradients(unet(kind))
    model = unet(kind)
    model.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=use_reentrant))
    found = gradients(model)
    assert found.keys() == expected.keys()
    assert len(expected) > 20
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max()) <= 5e-6 * float(gradient.abs().max()), name


@ALL
def test_a_compiled_unet_is_compiled_once_for_all_strengths(kind):
    model = unet(kind).eval()
    timesteps = [torch.tensor([t, 1000 - t]) for t in (3, 250, 420, 777)]  # never one for both
    with torch.no_grad():
        expected = [call(model, t) for t in timesteps]
        torch._dynamo.reset()
        counters.clear()
        backend = CompileCounterWithBackend("eager")
        model.compile(backend=backend)
        first = call(model, timesteps[0])
        graphs = backend.frame_count
        with torch._dynamo.config.patch(error_on_recompile=True):
            found = [first, *(call(model, t) for t in timesteps[1:])]
            set_strength(model, "default", StrengthSchedule([(0.2, 0.1), (0.2, 0.7)]))
            other = call(model, timesteps[1])
            set_strength(model, "default", SCHEDULE)
            found.append(call(model, timesteps[3]))
    for actual, reference in zip(found, [*expected, expected[3]], strict=True):
        assert relative_error(actual, reference) < 1e-5
    assert relative_error(other, expected[1]) > 1e-3
    assert graphs == backend.frame_count <= 2
    assert not counters["graph_break"]
    torch._dynamo.reset()


@ALL
@pytest.mark.parametrize("on_disk", [False, True])
def test_group_offload_gives_the_same_numbers(kind, on_disk, tmp_path: Path):
    model = unet(kind).eval()
    with torch.no_grad():
        expected = call(model, TIMESTEPS[0])
        disk = {"offload_to_disk_path": str(tmp_path)} if on_disk else {}
        model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), "leaf_level", **disk)
        assert relative_error(call(model, TIMESTEPS[0]), expected) < 1e-6
        set_number(model, "default", 0.4)
        if kind != "DoRA" or not on_disk:  # PEFT's own DoRA reads weights that are on disk
            reference = unet(kind, None).eval()
            set_strength(reference, "default", 0.4)
            assert relative_error(call(model, TIMESTEPS[0]), call(reference, TIMESTEPS[0])) < 1e-6
        set_strength(model, "default", SCHEDULE)
        assert relative_error(call(model, TIMESTEPS[0]), expected) < 1e-6


@ALL
def test_half_precision_rounds_the_update_and_not_its_strength(kind):
    """In bfloat16 λ = 0.777 and s(λ) would be off by a quarter of a per cent."""
    model, number = unet(kind).eval().to(torch.bfloat16), unet(kind, None).eval().to(torch.bfloat16)
    set_strength(number, "default", SCHEDULE(0.777).item())

    def run(model: Any) -> Tensor:
        generator = torch.Generator().manual_seed(2)
        sample, text = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((1, 4, 8, 8), (1, 5, 16)))
        with torch.no_grad():
            return model(sample, torch.tensor([777]), text).sample

    assert relative_error(run(model), run(number)) < 0.03


def test_threads_have_their_own_strength():
    model = adapted_by("LoRA", TwoLayers(), target_modules=["first", "second"])
    set_strength(model, "default", SCHEDULE)
    x, found = torch.randn(3, 7), {}

    def at(level: float) -> Tensor:
        with noise_level(model, level), torch.no_grad():
            return model(x)

    expected = {level: at(level) for level in LEVELS.tolist()}
    barrier = threading.Barrier(3, timeout=60)

    def work(level: float) -> None:
        barrier.wait()
        found[level] = all(torch.equal(at(level), expected[level]) for _ in range(50))

    threads = [threading.Thread(target=work, args=(level,)) for level in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(expected, True)


def test_a_part_that_is_called_by_itself_has_the_strength_of_the_context():
    model = adapted_by("LoRA", TwoLayers(), target_modules=["first", "second"])
    set_strength(model, "default", SCHEDULE)
    first, x = model.base_model.model.first, torch.randn(3, 7)
    with noise_level(model, LEVELS), torch.no_grad():
        y = first(x)
    A, B = first.lora_A["default"].weight.double(), first.lora_B["default"].weight.double()
    update = strength_by_hand(LEVELS)[:, None] * (6 / 4 * x.double() @ A.T @ B.T)
    assert relative_error(y, first.base_layer(x).double() + update) < 2e-6
    with pytest.raises(RuntimeError, match=r"No C\(λ\) has reached layer 'first'"):
        first(x)


@pytest.mark.parametrize("name", ["UNetMotionModel", "UNet3DConditionModel", "WanTransformer3DModel"])
def test_frames_have_the_strength_of_their_sample(name):
    model: Any = denoiser(name)
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=5, target_modules=["to_q", "to_out.0"]), model)
    disturb(model)
    inputs = inputs_of(name)
    base = tensor_of(model(timestep=torch.tensor([120, 870]), **inputs)).detach()
    set_strength(model, "default", SCHEDULE)
    with torch.no_grad():
        found = tensor_of(model(timestep=torch.tensor([120, 870]), **inputs))
        for i, timestep in enumerate((120, 870)):
            set_number(model, "default", SCHEDULE(timestep / 1000).item())
            expected = tensor_of(model(timestep=torch.tensor([timestep]), **sample_of(inputs, i, 2)))
            torch.testing.assert_close(found[i : i + 1], expected, rtol=1e-3, atol=1e-4)
            assert float((base[i] - found[i]).abs().max()) > 1e-2
