"""sdxl-tiny as shipped: true classes, small files, finite in float16, and pictures that are what their prompts say."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from make_sdxl_tiny import parameters
from safetensors.torch import load_file
from tiny_clip.vocabulary import words
from tiny_drawings.scenes import Scene, render
from tiny_images.evaluation import GUIDANCE
from tiny_images.vae import VALIDATION_SPLIT, pixels, reconstruction, scenes
from transformers import CLIPModel, CLIPProcessor, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
FOLDER = ASSETS / "sdxl-tiny"
PROMPTS = (
    "a photo of a red car on the beach",
    "a photo of a blue house in the snow",
    "a photo of a large yellow balloon in the desert",
    "a photo of a purple flower on the grass",
    "a photo of an orange toy in the forest",
    "a photo of a small red mushroom on a tiled floor",
    "a photo of a green tree in space",
    "a photo of a white and blue boat at night",
)


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionXLPipeline:
    pipe = StableDiffusionXLPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_parts_are_of_the_true_classes_and_sizes(pipe: StableDiffusionXLPipeline) -> None:
    classes = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
        "tokenizer": CLIPTokenizer,
        "tokenizer_2": CLIPTokenizer,
        "scheduler": EulerDiscreteScheduler,
    }
    assert {name: type(getattr(pipe, name)) for name in classes} == classes
    assert pipe.unet.config.addition_embed_type == "text_time"
    assert pipe.unet.dtype == torch.float32
    assert (pipe.default_sample_size * pipe.vae_scale_factor, pipe.vae_scale_factor) == (64, 4)
    size = parameters(pipe)
    assert 3.5e6 < size["unet"] < 5e6
    assert 0.7e6 < size["vae"] < 0.9e6
    assert size == json.loads((FOLDER / "results.json").read_text())["parameters"]


def test_the_files_are_float16_and_no_larger_than_15_mb() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 15e6
    weights = list(FOLDER.rglob("*.safetensors"))
    assert len(weights) == 4
    assert not list(FOLDER.rglob("*.bin")) + list(FOLDER.rglob("*.pt"))
    kept = {"text_model.embeddings.position_ids"}
    for path in weights:
        assert {str(value.dtype) for name, value in load_file(path).items() if name not in kept} == {"torch.float16"}


def test_the_tokenizers_are_clips_own_files(pipe: StableDiffusionXLPipeline) -> None:
    for name in ("tokenizer", "tokenizer_2"):
        assert {path.name for path in (FOLDER / name).iterdir()} >= {
            "vocab.json",
            "merges.txt",
            "tokenizer_config.json",
        }
        tokenizer = CLIPTokenizer.from_pretrained(FOLDER / name)
        assert all(len(tokenizer(word, add_special_tokens=False).input_ids) == 1 for word in words())
        assert len(tokenizer(PROMPTS[0]).input_ids) == len(PROMPTS[0].split()) + 2, "not padded unless it is asked to"
        assert (tokenizer.model_max_length, tokenizer.get_vocab()) == (24, getattr(pipe, name).get_vocab())


def test_the_scheduler_is_sdxls(pipe: StableDiffusionXLPipeline) -> None:
    expected = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "timestep_spacing": "leading",
        "steps_offset": 1,
        "use_karras_sigmas": False,
    }
    assert {name: pipe.scheduler.config[name] for name in expected} == expected


def test_the_second_text_encoder_is_clip_tinys(pipe: StableDiffusionXLPipeline) -> None:
    clip, processor = (
        CLIPModel.from_pretrained(ASSETS / "clip-tiny"),
        CLIPProcessor.from_pretrained(ASSETS / "clip-tiny"),
    )
    inputs = pipe.tokenizer_2(list(PROMPTS), padding="max_length", return_tensors="pt")
    assert pipe.tokenizer_2.get_vocab() == processor.tokenizer.get_vocab()
    own = pipe.text_encoder_2(**inputs).text_embeds
    expected = clip.float().get_text_features(**inputs).pooler_output
    torch.testing.assert_close(own, expected, rtol=0, atol=1e-5)


def test_the_autoencoder_restores_held_out_scenes(pipe: StableDiffusionXLPipeline) -> None:
    recorded = json.loads((FOLDER / "results.json").read_text())["reconstruction"]
    measured = reconstruction(pipe.vae, 64)
    assert measured["absolute_error"] == pytest.approx(recorded["absolute_error"], rel=0.02)
    assert measured["absolute_error"] < 0.03
    x = pixels([render(scene) for scene in scenes(VALIDATION_SPLIT, 0, 32)])
    latents = pipe.vae.encode(x).latent_dist.mode() * pipe.vae.config.scaling_factor
    assert latents.std().item() == pytest.approx(1, abs=0.1)
    assert latents.std((0, 2, 3)).min() > 0.2, "no channel has collapsed to its prior"


def test_the_autoencoder_stays_far_from_float16s_limit(pipe: StableDiffusionXLPipeline) -> None:
    """Every module's output, for pictures and for latents of thrice their size: below a tenth of 65504."""
    largest = []
    hooks = [
        module.register_forward_hook(lambda *call: largest.append(call[2].abs().max().item()))
        for module in pipe.vae.modules()
        if not list(module.children())
    ]
    with torch.no_grad():
        latents = pipe.vae.encode(pixels([render(scene) for scene in scenes(VALIDATION_SPLIT, 0, 16)])).latent_dist
        pipe.vae.decode(3 * latents.mode())
    for hook in hooks:
        hook.remove()
    assert len(largest) > 60
    assert max(largest) < 6550


def test_the_autoencoder_is_finite_in_float16() -> None:
    """On 16 × 16 pixels of a white and black ball: torch is slow at float16 on the CPU."""
    vae = AutoencoderKL.from_pretrained(FOLDER / "vae", torch_dtype=torch.float16)
    shown = render(Scene("ball", "white", "black", "large", "", "in the snow", "bright"))
    x = pixels([shown.crop((24, 32, 40, 48))]).half()
    with torch.no_grad():
        decoded = vae.decode(vae.encode(x).latent_dist.mode()).sample
    assert decoded.isfinite().all()
    assert (decoded - x).abs().mean() / 2 < 0.15


def test_pictures_show_what_their_prompts_say(pipe: StableDiffusionXLPipeline) -> None:
    """Of eight prompts, a picture's own is the nearest as clip-tiny sees it, for all but one picture at most."""
    generators = [torch.Generator().manual_seed(number) for number in range(len(PROMPTS))]
    images = pipe(list(PROMPTS), num_inference_steps=12, guidance_scale=GUIDANCE, generator=generators).images
    assert {image.size for image in images} == {(64, 64)}
    clip, processor = (
        CLIPModel.from_pretrained(ASSETS / "clip-tiny"),
        CLIPProcessor.from_pretrained(ASSETS / "clip-tiny"),
    )
    with torch.no_grad():
        output = clip.float()(**processor(text=list(PROMPTS), images=images, padding=True, return_tensors="pt"))
    cosines = output.image_embeds @ output.text_embeds.T
    assert (cosines.argmax(1) == torch.arange(len(PROMPTS))).sum() >= len(PROMPTS) - 1
    assert cosines.diagonal().mean() > 0.5


def test_the_card_says_what_was_measured() -> None:
    results, card = json.loads((FOLDER / "results.json").read_text()), (FOLDER / "README.md").read_text()
    assert f"{results['samples']['text_alignment']:.3f}" in card
    assert f"{results['reconstruction']['psnr']:.1f} dB" in card
    assert results["samples"]["own_prompt_is_nearest"] > 0.5
    assert all(
        (FOLDER / name).exists() for name in ("samples.png", "unet_curve.png", "vae_curve.png", "unet_curve.csv")
    )
