"""The pipeline that is trained, the one that samples, and the adapter between them and its files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from peft import HiraConfig, LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from nara_diffusion import NaraConfig
from nara_diffusion.dreambooth.denoiser import (
    LORA_WEIGHTS,
    TEXT_TARGETS,
    AdaptedDenoiser,
    adapter_loaded,
    text_config,
    write_adapter,
)
from nara_diffusion.dreambooth.image_arguments import family_defaults
from nara_diffusion.dreambooth.pipelines import load_pipeline, sharing_pipeline
from nara_flags.images import UNET_TARGETS
from tests.helpers.small_pipelines import pixels, small_sd3, small_sdxl

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
SIZES: dict[str, Any] = {"r": 3, "lora_alpha": 5.0, "target_modules": [*UNET_TARGETS, "conv1"]}
PATTERNS: dict[str, Any] = {"rank_pattern": {"(to_v|v_proj)": 2}, "alpha_pattern": {"(to_k|k_proj)": 7.0}}
CONFIGS: dict[str, Any] = {
    "nara": lambda: NaraConfig(**SIZES, core_hidden_dims=(4, 4), noise_convention="timestep"),
    "lora": lambda: LoraConfig(**SIZES, **PATTERNS),
    "dora": lambda: LoraConfig(**SIZES, **PATTERNS, use_dora=True),
    "hira": lambda: HiraConfig(r=3, target_modules=UNET_TARGETS),
}


@pytest.mark.parametrize("method", ["nara", "dora", "hira"])
def test_every_trained_weight_gets_a_float32_gradient(method: str) -> None:
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
    last = f"layers.{pipe.text_encoder.config.num_hidden_layers - 1}."  # SDXL reads the states before it
    used = {name for name in model.trained if not (name.startswith("text_encoder.") and last in name)}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == used < model.trained.keys()
    assert {name.partition(".")[0] for name in model.trained} == {"unet", "text_encoder", "text_encoder_2"}
    assert not any(id(p) in base for p in model.trained.values())
    assert isinstance(model.unet, PeftModel) is (method == "hira")


def test_text_encoders_have_unet_options_except_the_cores() -> None:
    shared: dict[str, Any] = PATTERNS | {"lora_dropout": 0.1, "init_lora_weights": "gaussian", "use_dora": True}
    shared |= {"use_rslora": True, "r": 3, "lora_alpha": 5.0}
    core: dict[str, Any] = {"core_sharing": "layer", "noise_embedding": "raw", "noise_convention": "timestep"}
    assert text_config(LoraConfig(**shared, target_modules=["to_q"])) == LoraConfig(
        **shared, target_modules=TEXT_TARGETS
    )
    expected = NaraConfig(**shared, target_modules=TEXT_TARGETS, core_type="identity")
    assert text_config(NaraConfig(**shared, **core, target_modules=["to_q"])) == expected


@pytest.mark.parametrize("option", [{"init_lora_weights": "pissa"}, {"bias": "all"}], ids=str)
def test_adapter_bound_to_one_base_copy_is_refused(option: dict[str, Any]) -> None:
    pipe = small_sdxl()
    names = {name for name, _ in pipe.unet.named_modules()}
    with pytest.raises(ValueError, match="changes the base model"):
        AdaptedDenoiser(pipe, NaraConfig(**SIZES, **option))
    assert {name for name, _ in pipe.unet.named_modules()} == names


# ---------------------------------------------------------------------- files


def test_file_lacking_a_tensor_is_refused_without_change(tmp_path: Path) -> None:
    write_adapter(AdaptedDenoiser(small_sdxl(), CONFIGS["lora"](), train_text_encoder=True), tmp_path, {})
    tensors = load_file(tmp_path / LORA_WEIGHTS)
    tensors.pop(next(key for key in tensors if "lora_B" in key))
    save_file(tensors, tmp_path / LORA_WEIGHTS, metadata={"format": "pt"})
    sampler = small_sdxl()
    components = {name: getattr(sampler, name) for name in COMPONENTS}
    with (
        pytest.raises(ValueError, match=r"and 1 others are not in the file"),
        adapter_loaded(sampler, tmp_path),
    ):
        pytest.fail("a layer at random")
    assert all(getattr(sampler, name) is part for name, part in components.items())
    torch.testing.assert_close(pixels(sampler), pixels(small_sdxl()), rtol=0, atol=0)


# ---------------------------------------------------------------------- pipelines


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small_sdxl().save_pretrained(tmp_path / "sdxl")
    return tmp_path / "sdxl"


def test_twin_shares_weights_and_nothing_that_comes_later(folder: Path) -> None:
    pipe = load_pipeline(str(folder), dtype=torch.float32)
    assert not any(p.requires_grad for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters())
    other = sharing_pipeline(pipe, torch.float32)
    original = pixels(other)
    torch.testing.assert_close(original, pixels(StableDiffusionXLPipeline.from_pretrained(folder)), rtol=0, atol=0)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        mine, theirs = getattr(pipe, name), getattr(other, name)
        assert mine is not theirs
        assert all(a is b for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))
    model = AdaptedDenoiser(pipe, CONFIGS["nara"](), train_text_encoder=True, gradient_checkpointing=True)
    for parameter in model.trained.values():
        parameter.data += 0.5
    assert (pixels(pipe) - original).abs().max() > 1e-3
    torch.testing.assert_close(pixels(other), original, rtol=0, atol=0)
    assert not any("lora" in name or "nara" in name for name, _ in other.unet.named_modules())
    assert not other.unet.is_gradient_checkpointing


def test_half_precision_twin_equals_a_loaded_pipeline(folder: Path, tmp_path: Path) -> None:
    vae = small_sdxl().vae
    vae.register_to_config(scaling_factor=0.5)
    vae.save_pretrained(tmp_path / "vae")
    other = load_pipeline(str(folder), dtype=torch.float32, vae_name=str(tmp_path / "vae"))
    assert other.vae.config.scaling_factor == 0.5
    pipe = load_pipeline(str(folder), dtype=torch.bfloat16)
    assert (pipe.unet.dtype, pipe.vae.dtype) == (torch.bfloat16, torch.float32)
    user = StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    user.set_progress_bar_config(disable=True)
    torch.testing.assert_close(pixels(sharing_pipeline(pipe, torch.bfloat16)), pixels(user), rtol=0, atol=0)
    assert pipe.vae.dtype == torch.float32


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}], ids=["one file", "shards"])
def test_model_with_only_variant_files_names_the_option(tmp_path: Path, shards: dict[str, Any]) -> None:
    small_sdxl().save_pretrained(tmp_path / "sdxl", variant="fp16", **shards)
    with pytest.raises(ValueError, match=r"sdxl can't be loaded as .* --variant fp16 takes the files"):
        load_pipeline(str(tmp_path / "sdxl"), dtype=torch.float32)
    assert load_pipeline(str(tmp_path / "sdxl"), dtype=torch.float32, variant="fp16").unet.dtype == torch.float32


def test_model_without_files_of_the_variant_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=f"{folder} can't be loaded as Stable Diffusion XL: .*fp16"):
        load_pipeline(str(folder), dtype=torch.float32, variant="fp16")


@pytest.mark.parametrize("name", ["sdxl.safetensors", "gone/model.ckpt", "folder.v1/a.file"])
def test_single_file_model_is_refused_with_its_conversion(name: str, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / name
    if "gone" not in name:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"weights")
    message = rf"'{path}' is the name of a file, .*from_single_file\('{path}'\)\.save_pretrained\('{path.stem}'\)"
    with pytest.raises(ValueError, match=message):
        family_defaults({"pretrained_model_name_or_path": str(path)})
    with pytest.raises(ValueError, match=message):
        load_pipeline(str(path), dtype=torch.float32)
    with pytest.raises(ValueError, match=f"'{path}' is the name of a file, .* an autoencoder"):
        load_pipeline(str(folder), dtype=torch.float32, vae_name=str(path))


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")  # of Diffusers' download
def test_model_that_cannot_be_trained_is_refused(folder: Path, tmp_path: Path) -> None:
    wrong = small_sd3()
    wrong.register_modules(scheduler=DDPMScheduler())
    wrong.save_pretrained(tmp_path / "wrong")
    unreached = "some/vae can't be loaded as .* the Hub can't be reached.*--pretrained_vae_model_name_or_path none"
    for name, vae, message in [
        ("nothing", None, r"nothing' is not a local folder, and loading a model of Diffusers from a repository"),
        (
            "wrong",
            None,
            r"wrong can't be loaded as Stable Diffusion 3 .*: it has a DDPMScheduler, which can't train",
        ),
        ("sdxl", str(tmp_path / "no-vae"), "with the autoencoder .*no-vae can't be loaded"),
        ("sdxl", "some/vae", unreached),
    ]:
        with pytest.raises(ValueError, match=message):
            load_pipeline(str(tmp_path / name), dtype=torch.float32, vae_name=vae)
    (weights,) = (folder / "text_encoder").glob("*.safetensors")
    os.truncate(weights, weights.stat().st_size // 2)  # half downloaded
    with pytest.raises(ValueError, match=rf"{folder} can't be loaded as Stable Diffusion XL: "):
        load_pipeline(str(folder), dtype=torch.float32)
    index = json.loads((folder / "model_index.json").read_text()) | {"_class_name": "StableCascadeDecoderPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match=r"StableCascadeDecoderPipeline can't be trained here. Supported are Stable Diffusion 1"
    ):
        load_pipeline(str(folder), dtype=torch.float32)
