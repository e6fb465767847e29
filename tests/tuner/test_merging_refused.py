"""All layers are merged, or none is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nara_diffusion import noise_level
from nara_diffusion.noise.level import core_holders
from tests.helpers.adapted import (
    OneLayer,
    TwoLayers,
    adapted,
)


def tensors_of_base(model: Any) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items() if "lora_" not in n and "nara_core" not in n}


def unmerged_output(model: Any, x: torch.Tensor, level: float) -> torch.Tensor:
    with noise_level(model, level), torch.no_grad():
        return model(x)


class LinearThenGrouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(6, 8, 1)
        self.second = nn.Conv1d(8, 8, 3, groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_a_merge_that_one_layer_refuses_touches_none(merge):
    model = adapted(LinearThenGrouped(), target_modules=["first", "second"])
    x = torch.randn(3, 6, 5)
    expected, before = unmerged_output(model, x, 0.35), tensors_of_base(model)
    with pytest.raises(NotImplementedError, match="groups > 1"):
        getattr(model, merge)(noise_level=0.35)
    for name, tensor in tensors_of_base(model).items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(unmerged_output(model, x, 0.35), expected, rtol=1e-5, atol=1e-5)
    assert core_holders(model)[0].needs_noise


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer")
def test_a_bias_without_a_place_to_go_is_refused_before_the_weight_changes():
    model = adapted(OneLayer(nn.Linear(7, 5, bias=False)), target_modules=["layer"], lora_bias=True)
    before = tensors_of_base(model)
    with pytest.raises(ValueError, match="which is quantised or has no bias"):
        model.merge_adapter(noise_level=0.35)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of_base(model).items())


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_a_safe_merge_of_a_broken_adapter_touches_nothing(merge):
    model = adapted(TwoLayers(), target_modules=["first", "second"])
    before = tensors_of_base(model)
    model.base_model.model.second.lora_B["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        getattr(model, merge)(noise_level=0.35, safe_merge=True)
    for name, tensor in tensors_of_base(model).items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-5, atol=1e-6)
    assert core_holders(model)[0].needs_noise
