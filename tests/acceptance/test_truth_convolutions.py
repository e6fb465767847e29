"""Convolutions that PEFT's LoRA layers can't follow: A knows neither their dilation nor how they pad."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import get_peft_model
from torch import nn

from nara_diffusion import NaraConfig, noise_level


class Two(nn.Module):
    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        self.convolution, self.linear = convolution, nn.Linear(7, 5)


@pytest.mark.parametrize(
    ("convolution", "named"),
    [
        (nn.Conv1d(6, 7, 3, padding="same", dilation=2), r"Conv1d with dilation=\(2,\)"),
        (nn.Conv2d(6, 7, 3, padding=(2, 1), dilation=(2, 1)), r"Conv2d with dilation=\(2, 1\)"),
        (nn.Conv2d(6, 7, 3, padding=1, padding_mode="reflect"), "Conv2d with padding_mode='reflect'"),
        (nn.Conv3d(6, 7, 3, padding=1, padding_mode="circular"), "Conv3d with padding_mode='circular'"),
    ],
)
def test_it_is_refused_and_the_model_stays_as_it_was(convolution: nn.Module, named: str) -> None:
    for options in [{}, {"use_dora": True}, {"core_type": "identity"}]:
        model: Any = Two(copy.deepcopy(convolution))
        before = [name for name, _ in model.named_modules()]
        config = NaraConfig(r=3, target_modules=["linear", "convolution"], **options)
        with pytest.raises(ValueError, match=rf"cannot adapt 'convolution' \({named}\).*exclude_modules"):
            get_peft_model(model, config)
        assert [name for name, _ in model.named_modules()] == before
        get_peft_model(
            model, NaraConfig(r=3, target_modules=["linear", "convolution"], exclude_modules=["convolution"])
        )


def test_a_unet_with_circular_padding_as_for_seamless_textures_is_refused() -> None:
    unet = UNet2DConditionModel(
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), mid_block_type=None, layers_per_block=1,
        block_out_channels=(8,), norm_num_groups=4, cross_attention_dim=4, attention_head_dim=4,
    )  # fmt: skip
    for module in unet.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"
    with pytest.raises(ValueError, match=r"\(Conv2d with padding_mode='circular'\)"):
        unet.add_adapter(NaraConfig(r=2, target_modules=["conv1"]))
    assert not hasattr(unet, "peft_config")


@torch.no_grad()
def test_others_are_their_merged_weights() -> None:
    convolution = nn.Conv2d(6, 10, (3, 2), stride=(2, 1), padding=(1, 0))
    model = get_peft_model(nn.Sequential(convolution), NaraConfig(r=4, lora_alpha=7, target_modules=["0"])).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    x = torch.randn(2, 6, 9, 8, generator=generator)
    with noise_level(model, 0.3):
        expected = model(x)
    torch.testing.assert_close(model.merge_and_unload(noise_level=0.3)(x), expected)
