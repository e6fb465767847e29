"""The pipeline that is trained and the pipeline that samples."""

import json
import os
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline

from nara_diffusion import NaraConfig
from nara_diffusion.dreambooth.denoiser import AdaptedDenoiser
from nara_diffusion.dreambooth.pipelines import load_pipeline, sharing_pipeline
from tests.helpers.small_pipelines import pixels, small_sd3, small_sdxl

CONFIG = NaraConfig(r=2, target_modules=["to_q"], core_hidden_dims=(4, 4), noise_convention="timestep")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small_sdxl().save_pretrained(tmp_path / "sdxl")
    return tmp_path / "sdxl"


def test_twin_shares_weights_and_nothing_that_comes_later(folder: Path) -> None:
    pipe = load_pipeline(str(folder), dtype=torch.float32)
    assert not any(p.requires_grad for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters())
    other = sharing_pipeline(pipe, torch.float32)
    before = pixels(other)
    torch.testing.assert_close(before, pixels(StableDiffusionXLPipeline.from_pretrained(folder)), rtol=0, atol=0)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        mine, theirs = getattr(pipe, name), getattr(other, name)
        assert mine is not theirs
        assert all(a is b for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))
    model = AdaptedDenoiser(pipe, CONFIG, train_text_encoder=True, gradient_checkpointing=True)
    for parameter in model.trained.values():
        parameter.data += 0.5
    assert (pixels(pipe) - before).abs().max() > 1e-3
    torch.testing.assert_close(pixels(other), before, rtol=0, atol=0)
    assert not any("lora" in name or "nara" in name for name, _ in other.unet.named_modules())
    assert not other.unet.is_gradient_checkpointing


def test_twin_in_half_precision_is_what_a_user_loads(folder: Path, tmp_path: Path) -> None:
    vae = small_sdxl().vae
    vae.register_to_config(scaling_factor=0.5)
    vae.save_pretrained(tmp_path / "vae")
    other = load_pipeline(str(folder), dtype=torch.float32, vae_name=str(tmp_path / "vae"))
    assert other.vae.config.scaling_factor == 0.5
    pipe = load_pipeline(str(folder), dtype=torch.bfloat16, vae_dtype=torch.float32)
    assert (pipe.unet.dtype, pipe.vae.dtype) == (torch.bfloat16, torch.float32)
    user = StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    user.set_progress_bar_config(disable=True)
    torch.testing.assert_close(pixels(sharing_pipeline(pipe, torch.bfloat16)), pixels(user), rtol=0, atol=0)
    assert pipe.vae.dtype == torch.float32


def test_model_without_files_of_the_variant_is_loaded_from_the_others(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small_sdxl().vae.save_pretrained(tmp_path / "vae")
    for vae in (None, str(tmp_path / "vae")):
        caplog.clear()
        pipe = load_pipeline(str(folder), dtype=torch.float32, vae_name=vae, variant="fp16")
        assert f"{folder} lacks files of the variant fp16: those without one are loaded" in caplog.text
    own = StableDiffusionXLPipeline.from_pretrained(folder)
    torch.testing.assert_close(pixels(pipe), pixels(own), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")  # of Diffusers' download
def test_model_that_cannot_be_trained_is_refused(folder: Path, tmp_path: Path) -> None:
    refiner, wrong = small_sdxl(), small_sd3()
    refiner.register_modules(text_encoder=None, tokenizer=None)
    refiner.save_pretrained(tmp_path / "refiner")
    wrong.register_modules(scheduler=DDPMScheduler())
    wrong.save_pretrained(tmp_path / "wrong")
    unreached = "some/vae can't be loaded as .* the Hub can't be reached: .*--pretrained_vae_model_name_or_path none"
    for name, vae, message in [
        ("nothing", None, r"There is no folder '.*nothing', and a model of Diffusers in a repository"),
        ("refiner", None, "name SDXL's base model, not its refiner"),
        (
            "wrong",
            None,
            r"wrong can't be loaded as .*: DDPMScheduler is no scheduler that Stable Diffusion 3 and 3.5 is",
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
    with pytest.raises(ValueError, match=r"StableCascadeDecoderPipeline is no class .* expected Stable Diffusion 1"):
        load_pipeline(str(folder), dtype=torch.float32)
