"""Attention processors, slicing, FreeU and PAG through whole pipelines: each call equals one with merged weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    FluxPipeline,
    StableDiffusion3PAGPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionXLPAGPipeline,
)
from diffusers.models.attention_processor import (
    AttnAddedKVProcessor,
    AttnAddedKVProcessor2_0,
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnAddedKVProcessor,
    SlicedAttnProcessor,
)
from torch import Tensor, nn

from nara_diffusion import noise_level
from tests.diffusers.reference import ATTENTION, ROUNDING, adapt, compare_calls, follow, latents, watch
from tests.helpers.adapted import disturb, nara_config, relative_error
from tests.helpers.denoisers.models import denoiser, inputs_of, tensor_of
from tests.helpers.rounding import rounding_of
from tests.helpers.small_pipelines import pixels, small_flux, small_sd, small_sd3, small_sdxl, small_unet

pytestmark = pytest.mark.filterwarnings("ignore:.*PAG.*deprecated:FutureWarning")


class OwnProcessor:
    """A custom attention processor in the manner of xFormers': heads in the batch, an attention of one's own."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None, **_: Any
    ) -> Tensor:
        self.calls += 1
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        query, key, value = (attn.head_to_batch_dim(part).contiguous() for part in (query, key, value))
        attended = torch.softmax(query @ key.transpose(1, 2) * attn.scale, dim=-1) @ value
        return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(attended)))


FEATURES: dict[str, Callable[[Any], Any]] = {
    "AttnProcessor": lambda unet: unet.set_attn_processor(AttnProcessor()),
    "AttnProcessor2_0": lambda unet: unet.set_attn_processor(AttnProcessor2_0()),
    "SlicedAttnProcessor": lambda unet: unet.set_attn_processor(SlicedAttnProcessor(1)),
    "a processor of one's own": lambda unet: unet.set_attn_processor(OwnProcessor()),
    "enable_attention_slicing": lambda unet: unet.set_attention_slice("auto"),
    "FreeU": lambda unet: unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
    "channels_last": lambda unet: unet.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_each_call_of_a_pipeline_equals_one_with_merged_weights(feature):
    pipe = small_sdxl()
    unet, plain = adapt(pipe.unet)
    for model in (unet, plain):
        FEATURES[feature](model)
    errors, levels = compare_calls(unet, plain), watch(unet)
    pixels(pipe, ["a photo of a toy", "red grass"], num_images_per_prompt=2)
    assert len(errors) == len(levels) == 3
    assert max(errors) < ROUNDING
    assert [len(level) for level in levels] == [1, 1, 1]


ADDED_KV = [AttnAddedKVProcessor, AttnAddedKVProcessor2_0, lambda: SlicedAttnAddedKVProcessor(1)]


@pytest.mark.parametrize("processor", ADDED_KV, ids=["plain", "SDPA", "sliced"])
def test_attention_with_added_keys_and_values(processor):
    """As in DeepFloyd IF and Kandinsky 2."""
    model = small_unet(
        16,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    )
    unet, plain = adapt(model, [*ATTENTION, "add_k_proj", "add_v_proj"])
    for each in (unet, plain):
        each.set_attn_processor(processor())
    errors = compare_calls(unet, plain)
    for timestep in (950, 20):
        unet(torch.randn(2, 4, 8, 8), timestep, torch.randn(2, 5, 16))
    assert len(errors) == 2
    assert max(errors) < ROUNDING


def test_a_processor_of_one_s_own_is_really_called():
    pipe, processor = small_sdxl(), OwnProcessor()
    adapt(pipe.unet)
    pipe.unet.set_attn_processor(processor)
    pixels(pipe)
    assert processor.calls == 3 * len(pipe.unet.attn_processors)


def test_slices_and_tiles_of_the_vae_change_no_pixel_of_an_adapted_pipeline():
    """But for what tiles change themselves: the seams."""
    pipe, size = small_sd(), {"height": 48, "width": 48}
    adapt(pipe.unet)
    expected = pixels(pipe, ["a toy", "red"], **size)
    pipe.enable_attention_slicing(1)
    pipe.vae.enable_slicing()
    assert relative_error(pixels(pipe, ["a toy", "red"], **size), expected) < 3 * rounding_of(pipe.unet)
    pipe.vae.enable_tiling()
    tiled = pixels(pipe, ["a toy", "red"], **size)
    assert not torch.allclose(tiled, expected, atol=1e-3)
    with torch.no_grad():
        decoded = pipe.vae.decode(latents(pipe, ["a toy", "red"], **size) / pipe.vae.config.scaling_factor).sample
    by_hand = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(tiled, by_hand, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------- perturbed-attention guidance


@pytest.mark.parametrize("guidance_scale", [4.0, 1.0])
@pytest.mark.parametrize(
    ("make", "kind", "part"),
    [
        (small_sd, StableDiffusionPAGPipeline, "unet"),
        (small_sdxl, StableDiffusionXLPAGPipeline, "unet"),
        (small_sd3, StableDiffusion3PAGPipeline, "transformer"),
    ],
)
def test_perturbed_attention_guidance(make, kind, part, guidance_scale):
    """Inside its layers the batch falls into parts, of which each has the λ of all."""
    parts = {name: value for name, value in make().components.items() if value is not None}
    optional = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    optional = (
        optional if make is small_sd else {"text_encoder_3": None, "tokenizer_3": None} if make is small_sd3 else {}
    )
    layers = ["blocks.0"] if part == "transformer" else ["mid"]
    pipe = kind(**{**optional, **parts}, pag_applied_layers=layers)
    pipe.set_progress_bar_config(disable=True)
    model, plain = adapt(getattr(pipe, part), ATTENTION)
    errors: list[float] = []
    follow(plain, model)

    def compare(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        plain.set_attn_processor(dict(model.attn_processors))  # the pipeline sets them when it is called
        with torch.no_grad():
            errors.append(relative_error(tensor_of(output), tensor_of(plain(*args, **kwargs))))

    model.register_forward_hook(compare, with_kwargs=True)
    pixels(pipe, pag_scale=2.0, guidance_scale=guidance_scale)
    assert len(errors) >= 3
    assert max(errors) < ROUNDING
    unperturbed = pixels(pipe, pag_scale=0.0, guidance_scale=guidance_scale)
    assert not torch.equal(unperturbed, pixels(pipe, pag_scale=2.0, guidance_scale=guidance_scale))


# ---------------------------------------------------------------------- fused projections


FUSED = ["UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel", "WanTransformer3DModel"]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", FUSED)
def test_fused_projections_are_refused_until_they_are_unfused(name, when):
    """They are a copy of the base's weights, past the adapted layers."""
    model: Any = denoiser(name)
    inputs, timestep = inputs_of(name), torch.tensor([0.5, 0.25]) * (1 if name.startswith("Flux") else 1000)
    if when == "before":
        model.fuse_qkv_projections()
    torch.manual_seed(1)
    model.add_adapter(nara_config(target_modules=ATTENTION))
    disturb(model)
    if when == "after":
        with torch.no_grad():
            expected = tensor_of(model(**inputs, timestep=timestep))
        model.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"to_[qkv]' is adapted, but fuse_qkv_projections\(\)"):
        model(**inputs, timestep=timestep)
    model.disable_adapters()
    model(**inputs, timestep=timestep)
    model.enable_adapters()
    model.unfuse_qkv_projections()
    with torch.no_grad():
        output = tensor_of(model(**inputs, timestep=timestep))
    if when == "after":
        assert torch.equal(output, expected)


def test_projections_that_are_fused_with_a_merged_adapter_are_right():
    pipe = small_sd()
    unet, _ = adapt(pipe.unet, ATTENTION)
    with noise_level(unet, 0.5):
        expected = latents(pipe)
        unet.fuse_lora()
    unet.fuse_qkv_projections()
    torch.testing.assert_close(latents(pipe), expected, rtol=1e-3, atol=1e-3)
    unet.unfuse_lora()
    with pytest.raises(ValueError, match="is adapted, but fuse_qkv_projections"):
        pixels(pipe)


def test_fused_projections_that_no_adapter_touches_are_right():
    pipe = small_sd()
    unet, plain = adapt(pipe.unet, ["conv1", "proj_in"])
    errors = compare_calls(unet, plain)
    unet.fuse_qkv_projections()
    pixels(pipe)
    assert max(errors) < ROUNDING


def test_attention_of_flux_by_another_backend():
    pipe: FluxPipeline = small_flux()
    transformer, plain = adapt(pipe.transformer, [*ATTENTION, "add_k_proj", "proj_mlp"])
    errors = compare_calls(transformer, plain, level=lambda t: float(t.unique()), argument="timestep", position=3)
    transformer.set_attention_backend("native")
    pixels(pipe)
    assert len(errors) == 3
    assert max(errors) < ROUNDING
