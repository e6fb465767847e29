"""sd-tiny-flow as shipped: a stock Stable Diffusion 3 of true classes, small files, and pictures of their prompts."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from make_sdxl_tiny import parameters
from safetensors.torch import load_file
from tiny_drawings.scenes import render, scenes
from tiny_images.evaluation import GUIDANCE
from tiny_images.vae import VALIDATION_SPLIT, pixels
from transformers import CLIPModel, CLIPProcessor, CLIPTextModelWithProjection, CLIPTokenizer

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
FOLDER, SIBLING = ASSETS / "sd-tiny-flow", ASSETS / "sdxl-tiny"
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
def pipe() -> StableDiffusion3Pipeline:
    pipe = StableDiffusion3Pipeline.from_pretrained(FOLDER, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_parts_are_of_the_true_classes_and_sizes(pipe: StableDiffusion3Pipeline) -> None:
    classes = {
        "transformer": SD3Transformer2DModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModelWithProjection,
        "text_encoder_2": CLIPTextModelWithProjection,
        "tokenizer": CLIPTokenizer,
        "tokenizer_2": CLIPTokenizer,
        "scheduler": FlowMatchEulerDiscreteScheduler,
    }
    assert {name: type(getattr(pipe, name)) for name in classes} == classes
    assert pipe.text_encoder_3 is pipe.tokenizer_3 is None
    assert pipe.transformer.dtype == pipe.text_encoder.dtype == torch.float32
    assert (pipe.default_sample_size * pipe.vae_scale_factor, pipe.vae_scale_factor) == (64, 4)
    assert parameters(pipe) == json.loads((FOLDER / "results.json").read_text())["parameters"]


def test_the_files_are_float16_and_no_larger_than_8_mb() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 8e6
    weights = list(FOLDER.rglob("*.safetensors"))
    assert len(weights) == 4
    assert not list(FOLDER.rglob("*.bin")) + list(FOLDER.rglob("*.pt"))
    for path in weights:
        assert {value.dtype for value in load_file(path).values()} == {torch.float16}


def test_it_is_the_sibling_of_sdxl_tiny(pipe: StableDiffusion3Pipeline) -> None:
    """The same autoencoder, tokenizers and text encoders; the first one's projection is the identity."""
    for file in ("vae/diffusion_pytorch_model.safetensors", "text_encoder_2/model.safetensors"):
        ours, theirs = load_file(FOLDER / file), load_file(SIBLING / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    first, theirs = (
        load_file(FOLDER / "text_encoder/model.safetensors"),
        load_file(SIBLING / "text_encoder/model.safetensors"),
    )
    assert torch.equal(first.pop("text_projection.weight"), torch.eye(64).half())
    assert sorted(value.double().sum().item() for value in first.values()) == sorted(
        value.double().sum().item() for value in theirs.values()
    )
    for name in ("tokenizer", "tokenizer_2"):
        assert CLIPTokenizer.from_pretrained(SIBLING / name).get_vocab() == getattr(pipe, name).get_vocab()


def test_the_latents_have_mean_0_and_deviation_1(pipe: StableDiffusion3Pipeline) -> None:
    config = pipe.vae.config
    with torch.no_grad():
        z = pipe.vae.encode(pixels([render(scene) for scene in scenes(VALIDATION_SPLIT, 0, 32)])).latent_dist.mode()
    latents = (z - config.shift_factor) * config.scaling_factor
    assert latents.mean().item() == pytest.approx(0, abs=0.1)
    assert latents.std().item() == pytest.approx(1, abs=0.1)


def test_pictures_show_what_their_prompts_say(pipe: StableDiffusion3Pipeline) -> None:
    """Of eight prompts, a picture's own is the nearest as clip-tiny sees it, for all but two pictures at most."""
    generators = [torch.Generator().manual_seed(number) for number in range(len(PROMPTS))]
    call = {"num_inference_steps": 12, "guidance_scale": GUIDANCE, "max_sequence_length": 0}
    images = pipe(list(PROMPTS), generator=generators, **call).images
    assert {image.size for image in images} == {(64, 64)}
    clip, processor = (
        CLIPModel.from_pretrained(ASSETS / "clip-tiny"),
        CLIPProcessor.from_pretrained(ASSETS / "clip-tiny"),
    )
    with torch.no_grad():
        output = clip.float()(**processor(text=list(PROMPTS), images=images, padding=True, return_tensors="pt"))
    cosines = output.image_embeds @ output.text_embeds.T
    assert (cosines.argmax(1) == torch.arange(len(PROMPTS))).sum() >= len(PROMPTS) - 2
    assert cosines.diagonal().mean() > 0.4


def test_stock_padding_changes_pictures_little(pipe: StableDiffusion3Pipeline) -> None:
    """By default the pipeline puts 256 zero vectors where T5's would be; another noise changes a picture far more."""

    def drawn(seed: int, **options: int) -> torch.Tensor:
        call = {"num_inference_steps": 4, "guidance_scale": GUIDANCE, "output_type": "pt"}
        generators = [torch.Generator().manual_seed(seed + number) for number in range(2)]
        images = pipe(list(PROMPTS[:2]), generator=generators, **call, **options).images
        assert images.isfinite().all()
        return images

    without = drawn(0, max_sequence_length=0)
    assert (drawn(0) - without).abs().mean() < 0.5 * (drawn(7, max_sequence_length=0) - without).abs().mean()


def test_the_card_says_what_was_measured() -> None:
    results, card = json.loads((FOLDER / "results.json").read_text()), (FOLDER / "README.md").read_text()
    sibling = json.loads((SIBLING / "results.json").read_text())["samples"]
    for measured in (results["samples"], sibling):
        assert f"{measured['text_alignment']:.3f}" in card
        assert f"{measured['own_prompt_is_nearest']:.0%}" in card
    assert f"{results['validation_loss']:.3f}" in card
    assert f"{results['steps']} steps of" in card
    assert results["samples"]["own_prompt_is_nearest"] > 0.5
    assert all((FOLDER / name).exists() for name in ("samples.png", "transformer_curve.png", "transformer_curve.csv"))
