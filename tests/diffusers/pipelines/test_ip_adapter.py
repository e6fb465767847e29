"""IP-Adapter beside an adapter: its projections of the image, and the adapter's update, are those of each alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from tests.diffusers.reference import ROUNDING, adapt, compare_calls
from tests.helpers.small_pipelines import pixels, small_sd, small_sdxl


def ip_adapter_weights(
    unet: Any, image_width: int = 10, tokens: int = 4, seed: int = 7
) -> dict[str, dict[str, Tensor]]:
    """Random weights in the form of IP-Adapter files."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    width = unet.config.cross_attention_dim
    projection = {
        "proj.weight": draw(width * tokens, image_width),
        "proj.bias": draw(width * tokens),
        "norm.weight": 1 + draw(width),
        "norm.bias": draw(width),
    }
    attention: dict[str, Tensor] = {}
    key = 1
    for name in unet.attn_processors:
        if name.endswith("attn1.processor"):
            continue
        module = unet.get_submodule(name.removesuffix(".processor"))
        size = module.to_k.weight.shape[0]
        attention[f"{key}.to_k_ip.weight"], attention[f"{key}.to_v_ip.weight"] = draw(size, width), draw(size, width)
        key += 2
    return {"image_proj": projection, "ip_adapter": attention}


def image_embeds(prompts: int = 1) -> list[Tensor]:
    """As `prepare_ip_adapter_image_embeds` gives them under CFG: no image first, then the image of each prompt."""
    generator = torch.Generator().manual_seed(9)
    image = torch.randn(prompts, 1, 10, generator=generator)
    return [torch.cat([torch.zeros_like(image), image])]


@pytest.mark.parametrize("first", [False, True], ids=["NaRA first", "IP-Adapter first"])
@pytest.mark.parametrize("make", [small_sd, small_sdxl])
def test_ip_adapter(make, first):
    pipe = make()
    weights = ip_adapter_weights(pipe.unet)
    if first:
        pipe.unet._load_ip_adapter_weights(copy.deepcopy(weights))
    unet, plain = adapt(pipe.unet)
    if not first:
        for model in (unet, plain):
            model._load_ip_adapter_weights(copy.deepcopy(weights))
    assert "IPAdapterAttnProcessor2_0" in {type(p).__name__ for p in unet.attn_processors.values()}
    errors = compare_calls(unet, plain)
    image = pixels(pipe, ip_adapter_image_embeds=image_embeds())
    assert errors
    assert max(errors) < ROUNDING
    assert not torch.allclose(pixels(pipe, ip_adapter_image_embeds=[0 * image_embeds()[0]]), image, atol=1e-3)


def test_ip_adapter_with_an_image_and_its_encoder():
    torch.manual_seed(3)
    vision = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=10,
    )
    pipe = small_sd()
    size = {"height": 16, "width": 16}
    pipe.register_modules(
        image_encoder=CLIPVisionModelWithProjection(vision).eval(),
        feature_extractor=CLIPImageProcessor(size=size, crop_size=size),
    )
    unet, plain = adapt(pipe.unet)
    weights = ip_adapter_weights(unet)
    pipe.load_ip_adapter(copy.deepcopy(weights), subfolder="", weight_name="")
    plain._load_ip_adapter_weights(weights)
    errors = compare_calls(unet, plain)
    images = [pixels(pipe, ip_adapter_image=Image.new("RGB", (16, 16), color)) for color in ("red", "navy")]
    assert len(errors) == 8
    assert max(errors) < ROUNDING
    assert not torch.allclose(*images, atol=1e-3)


def test_the_projections_of_ip_adapter_may_be_adapted_too():
    pipe = small_sd()
    pipe.unet._load_ip_adapter_weights(ip_adapter_weights(pipe.unet))
    unet, plain = adapt(pipe.unet, ["to_k_ip.0", "to_v_ip.0", "image_embeds", "to_q"])
    assert any("to_k_ip.0.lora_A" in name for name, _ in unet.named_parameters())
    errors = compare_calls(unet, plain)
    pixels(pipe, ["a toy", "red"], num_images_per_prompt=2, ip_adapter_image_embeds=image_embeds(2))
    assert errors
    assert max(errors) < ROUNDING
