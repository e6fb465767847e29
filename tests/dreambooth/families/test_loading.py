"""The pipeline that is trained and the pipeline that samples."""

import json
import os
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline

from nara_diffusion import NaraConfig
from nara_diffusion.dreambooth.denoiser import AdaptedDenoiser
from nara_diffusion.dreambooth.families.loading import load_pipeline, sharing_pipeline
from tests.helpers.small_pipelines import pixels, small_sd3, small_sdxl

CONFIG = NaraConfig(r=2, target_modules=["to_q"], core_hidden_dims=(4, 4), noise_convention="timestep")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small_sdxl().save_pretrained(tmp_path / "sdxl")
    return tmp_path / "sdxl"


def test_a_twin_shares_weights_and_nothing_that_comes_later(folder) -> None:
    pipe = load_pipeline(str(folder), dtype=torch.float32)
    other = sharing_pipeline(pipe, torch.float32)
    before = pixels(other)
    torch.testing.assert_close(before, pixels(StableDiffusionXLPipeline.from_pretrained(folder)), rtol=0, atol=0)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        mine, theirs = getattr(pipe, name), getattr(other, name)
        assert mine is not theirs
        assert all(a is b for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))
    model = AdaptedDenoiser(pipe, CONFIG, train_text_encoder=True, gradient_checkpointing=True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.5
    assert (pixels(pipe) - before).abs().max() > 1e-3
    torch.testing.assert_close(pixels(other), before, rtol=0, atol=0)
    assert not any("lora" in name or "nara" in name for name, _ in other.unet.named_modules())
    assert not other.unet.is_gradient_checkpointing


def test_a_twin_in_half_precision_is_what_a_user_loads(folder) -> None:
    pipe = load_pipeline(str(folder), dtype=torch.bfloat16, vae_dtype=torch.float32)
    assert (pipe.unet.dtype, pipe.vae.dtype) == (torch.bfloat16, torch.float32)
    other = sharing_pipeline(pipe, torch.bfloat16)
    user = StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    user.set_progress_bar_config(disable=True)
    torch.testing.assert_close(pixels(other), pixels(user), rtol=0, atol=0)
    assert pipe.vae.dtype == torch.float32


def test_another_autoencoder(folder, tmp_path) -> None:
    vae = small_sdxl().vae
    vae.register_to_config(scaling_factor=0.5)
    vae.save_pretrained(tmp_path / "vae")
    pipe = load_pipeline(str(folder), dtype=torch.float32, vae_name=str(tmp_path / "vae"))
    assert pipe.vae.config.scaling_factor == 0.5


def test_nothing_is_trainable(folder) -> None:
    pipe = load_pipeline(str(folder), dtype=torch.float32)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_half_downloaded_part_is_told_in_one_line(folder, part: str) -> None:
    (weights,) = (folder / part).glob("*.safetensors")
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(ValueError, match=rf"{folder} can't be loaded as Stable Diffusion XL: "):
        load_pipeline(str(folder), dtype=torch.float32)


def test_refusals(folder, tmp_path) -> None:
    with pytest.raises(
        ValueError, match=r"pretrained_model_name_or_path .*nothing can't be loaded, since it has no model_index.json"
    ):
        load_pipeline(str(tmp_path / "nothing"), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"with the autoencoder .*no-vae can't be loaded"):
        load_pipeline(str(folder), dtype=torch.float32, vae_name=str(tmp_path / "no-vae"))
    small_sdxl(addition_embed_type=None).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"other can't be trained as .* has addition_embed_type None, expected"):
        load_pipeline(str(tmp_path / "other"), dtype=torch.float32)
    refiner = small_sdxl()
    refiner.register_modules(text_encoder=None, tokenizer=None)
    refiner.save_pretrained(tmp_path / "refiner")
    with pytest.raises(ValueError, match="has no first text encoder: SDXL's refiner"):
        load_pipeline(str(tmp_path / "refiner"), dtype=torch.float32)
    wrong = small_sd3()
    wrong.register_modules(scheduler=DDPMScheduler())
    wrong.save_pretrained(tmp_path / "wrong")
    with pytest.raises(ValueError, match=r"wrong can't be trained as .*: DDPMScheduler is no scheduler of a rectified"):
        load_pipeline(str(tmp_path / "wrong"), dtype=torch.float32)
    index = json.loads((folder / "model_index.json").read_text()) | {"_class_name": "StableCascadeDecoderPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"StableCascadeDecoderPipeline is no class .* expected Stable Diffusion 1"):
        load_pipeline(str(folder), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"sdxl\.safetensors is one file of weights: name a folder"):
        load_pipeline(str(tmp_path / "sdxl.safetensors"), dtype=torch.float32)
