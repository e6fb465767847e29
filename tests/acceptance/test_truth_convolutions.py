"""Convolutions that PEFT's LoRA layers can't follow: A knows neither their dilation nor how they pad."""

from __future__ import annotations

from typing import Any

import pytest
from peft import get_peft_model
from torch import nn

from nara_diffusion import NaraConfig
from tests.helpers.small_pipelines import small_unet


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
    model: Any = nn.ModuleDict({"convolution": convolution, "linear": nn.Linear(7, 5)})
    before = [name for name, _ in model.named_modules()]
    for options in ({}, {"use_dora": True}, {"core_type": "identity"}):
        config = NaraConfig(r=3, target_modules=["linear", "convolution"], **options)
        with pytest.raises(ValueError, match=rf"cannot adapt 'convolution' \({named}\).*exclude_modules"):
            get_peft_model(model, config)
        assert [name for name, _ in model.named_modules()] == before
    get_peft_model(model, NaraConfig(r=3, target_modules=["linear", "convolution"], exclude_modules=["convolution"]))


def test_a_unet_with_circular_padding_as_for_seamless_textures_is_refused() -> None:
    unet = small_unet(12)
    for module in unet.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"
    with pytest.raises(ValueError, match=r"\(Conv2d with padding_mode='circular'\)"):
        unet.add_adapter(NaraConfig(r=2, target_modules=["conv1"]))
    assert not hasattr(unet, "peft_config")
