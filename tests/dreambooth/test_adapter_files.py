"""Adapters of a UNet and its text encoders: what is trained, and the files, which Diffusers reads; checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from peft import HiraConfig, LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from nara_diffusion import NaraConfig
from nara_diffusion.dreambooth.denoiser import (
    LORA_WEIGHTS,
    TEXT_TARGETS,
    TRAINABLE,
    AdaptedDenoiser,
    adapter_loaded,
    read_checkpoint,
    text_config,
    write_adapter,
    write_checkpoint,
)
from nara_diffusion.dreambooth.image_arguments import UNET_TARGETS
from tests.helpers.small_pipelines import pixels, small_sdxl

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
SIZES: dict[str, Any] = {"r": 3, "lora_alpha": 5.0, "target_modules": [*UNET_TARGETS, "conv1"]}
PATTERNS: dict[str, Any] = {"rank_pattern": {"(to_v|v_proj)": 2}, "alpha_pattern": {"(to_k|k_proj)": 7.0}}
CONFIGS: dict[str, Any] = {
    "nara": lambda: NaraConfig(**SIZES, core_hidden_dims=(4, 4), noise_convention="timestep"),
    "lora": lambda: LoraConfig(**SIZES, **PATTERNS),
    "dora": lambda: LoraConfig(**SIZES, **PATTERNS, use_dora=True),
    "hira": lambda: HiraConfig(r=3, target_modules=UNET_TARGETS),
}


def trained(method: str, seed: int = 2, **options: Any) -> AdaptedDenoiser:
    """A UNet and two text encoders all of whose trained weights differ from those of their start."""
    torch.manual_seed(seed)
    model = AdaptedDenoiser(small_sdxl(), CONFIGS[method](), train_text_encoder=True, **options)
    disturb(model, seed)
    return model.eval()


@torch.no_grad()
def disturb(model: AdaptedDenoiser, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.trained.values():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("method", CONFIGS)
def test_everything_that_is_trained_gets_a_gradient_in_float32(method: str) -> None:
    pipe = small_sdxl()
    pipe.to(dtype=torch.bfloat16)
    for part in (pipe.unet, pipe.text_encoder, pipe.text_encoder_2):
        part.requires_grad_(False)
    base = set(map(id, [*pipe.unet.parameters(), *pipe.text_encoder.parameters(), *pipe.text_encoder_2.parameters()]))
    model = AdaptedDenoiser(pipe, CONFIGS[method](), train_text_encoder=True)
    generator = torch.Generator().manual_seed(4)
    ids = torch.tensor([[16.0, 16, 0, 0, 16, 16]]).expand(2, -1)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    prediction = model(sample, torch.tensor([100, 700]), ids, prompts=["a photo of a toy", "a toy"])
    prediction.float().square().mean().backward()
    assert {p.dtype for p in model.trained.values()} == {torch.float32}
    # DistributedDataParallel waits for ever for one that never gets a gradient
    assert {name for name, p in model.named_parameters() if p.grad is not None} == model.trained.keys()
    assert {name.partition(".")[0] for name in model.trained} == {"unet", "text_encoder", "text_encoder_2"}
    assert not any(id(p) in base for p in model.trained.values())
    assert isinstance(model.unet, PeftModel) is (method == "hira")


def test_text_encoders_have_the_options_of_the_unet_but_those_of_a_core() -> None:
    shared: dict[str, Any] = PATTERNS | {"lora_dropout": 0.1, "init_lora_weights": "gaussian", "use_dora": True}
    shared |= {"use_rslora": True, "r": 3, "lora_alpha": 5.0}
    core: dict[str, Any] = {"core_sharing": "layer", "noise_embedding": "raw", "noise_convention": "timestep"}
    assert text_config(LoraConfig(**shared, target_modules=["to_q"])) == LoraConfig(
        **shared, target_modules=TEXT_TARGETS
    )
    expected = NaraConfig(**shared, target_modules=TEXT_TARGETS, core_type="identity")
    assert text_config(NaraConfig(**shared, **core, target_modules=["to_q"])) == expected


@pytest.mark.parametrize("option", [{"init_lora_weights": "pissa"}, {"bias": "all"}], ids=str)
def test_adapter_that_no_other_copy_of_the_base_could_load_is_refused(option: dict[str, Any]) -> None:
    pipe = small_sdxl()
    names = {name for name, _ in pipe.unet.named_modules()}
    with pytest.raises(ValueError, match="changes the base model"):
        AdaptedDenoiser(pipe, NaraConfig(**SIZES, **option))
    assert {name for name, _ in pipe.unet.named_modules()} == names


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("method", CONFIGS)
def test_loaded_folder_draws_the_trained_pixels_and_leaves_the_base(method: str, tmp_path: Path) -> None:
    scheduler = DDIMScheduler() if method == "lora" else None
    model = trained(method, scheduler=scheduler)
    write_adapter(model, tmp_path, {})
    sampler = small_sdxl()
    before, own = pixels(sampler), sampler.scheduler
    with adapter_loaded(sampler, tmp_path):
        assert type(sampler.scheduler) is (type(own) if scheduler is None else DDIMScheduler)
        after = pixels(sampler)
    assert sampler.scheduler is own
    if scheduler is not None:
        model.pipe.scheduler = scheduler
    torch.testing.assert_close(after, pixels(model.pipe), rtol=1e-4, atol=1e-4)
    assert (after - before).abs().max() > 1e-3
    if method == "dora":  # Transformers finds magnitudes by the whole name, Diffusers by PEFT's short one
        magnitudes = [key for key in load_file(tmp_path / LORA_WEIGHTS) if "magnitude" in key]
        assert {key.partition(".")[0] for key in magnitudes} == set(COMPONENTS)
        assert all(key.endswith(".weight") is key.startswith("text") for key in magnitudes)
    torch.testing.assert_close(pixels(sampler), before, rtol=0, atol=0)


def test_file_that_lacks_a_tensor_is_refused_and_the_base_stays(tmp_path: Path) -> None:
    write_adapter(trained("lora"), tmp_path, {})
    tensors = load_file(tmp_path / LORA_WEIGHTS)
    tensors.pop(next(key for key in tensors if "lora_B" in key))
    save_file(tensors, tmp_path / LORA_WEIGHTS, metadata={"format": "pt"})
    sampler = small_sdxl()
    before = {name: getattr(sampler, name) for name in COMPONENTS}
    with pytest.raises(ValueError, match=r"did not load|lacks|adapted layer"), adapter_loaded(sampler, tmp_path):
        pytest.fail("a layer at random")
    assert all(getattr(sampler, name) is part for name, part in before.items())
    torch.testing.assert_close(pixels(sampler), pixels(small_sdxl()), rtol=0, atol=0)


@pytest.mark.parametrize("method", ["nara", "dora"])
def test_checkpoint_gives_every_tensor_back(method: str, tmp_path: Path) -> None:
    model, other = trained(method), trained(method, seed=5)
    write_checkpoint(model, tmp_path, {})
    before = {name: value.clone() for name, value in other.state_dict().items()}
    read_checkpoint(other, tmp_path)
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    changed = [name for name, value in before.items() if not torch.equal(value, state[name])]
    assert len(changed) >= len(model.trained)
    assert any("freq" in name for name in changed) is (method == "nara")
    assert {value.dtype for value in load_file(tmp_path / TRAINABLE).values()} == {torch.float32}
    tensors = load_file(tmp_path / TRAINABLE)
    save_file(tensors | {"unet.another.lora_A.default.weight": torch.zeros(1)}, tmp_path / TRAINABLE)
    with pytest.raises(
        ValueError, match=r"holds 'unet.another.lora_A.default.weight', which this adapter does not have"
    ):
        read_checkpoint(other, tmp_path)
