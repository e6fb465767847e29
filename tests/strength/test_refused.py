"""Strengths that are refused, and adapters that cannot have one: the model stays as it is."""

from __future__ import annotations

import pytest
from peft import LoHaConfig, get_peft_model
from torch import nn

from nara_diffusion import set_strength
from tests.helpers.adapted import TwoLayers, lora_config
from tests.strength.models import SCHEDULE, model_of, trace, with_two


class WithAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2)


@pytest.mark.parametrize(
    ("base", "options", "message"),
    [
        (WithAttention, {"target_modules": ["first", "attention"]}, "layer 'attention' .MultiheadAttention"),
        (
            TwoLayers,
            {"target_modules": ["first"], "lora_bias": True},
            r"the bias of B \(lora_bias=True\) of layer 'fir",
        ),
        (TwoLayers, {"target_modules": ["first"], "bias": "lora_only"}, r"biases that it trains \(bias='lora_only'\)"),
        (TwoLayers, {"target_modules": ["first"], "modules_to_save": ["second"]}, "'second', which is trained"),
        (TwoLayers, {"target_modules": ["first"], "alora_invocation_tokens": [1]}, "ALoraLinearVariant"),
        (TwoLayers, {"target_parameters": ["first.weight"], "target_modules": []}, "ParamWrapper"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_lora_that_a_schedule_would_not_reach_is_refused_and_left_alone(base, options, message):
    model = get_peft_model(base(), lora_config(**options))
    before = trace(model)
    with pytest.raises(ValueError, match=message) as error:
        set_strength(model, "default", SCHEDULE)
    assert "cannot have a strength that depends on λ" in str(error.value)
    assert "give this adapter a float" in str(error.value)
    assert trace(model) == before


def test_other_tuners_are_refused():
    model = get_peft_model(TwoLayers(), LoHaConfig(r=2, target_modules=["first"]))
    with pytest.raises(ValueError, match="layer 'first', which is adapted by PEFT's Linear and not by a LoRA"):
        set_strength(model, "default", SCHEDULE)


@pytest.mark.parametrize("strength", ["0.5", True, float("nan"), [(0, 1.0)], {"first": SCHEDULE}])
def test_what_is_no_strength_is_refused(strength):
    with pytest.raises(ValueError, match=r"strength is .*: pass StrengthSchedule"):
        set_strength(model_of("LoRA"), "default", strength)


def test_an_adapter_that_is_not_there_is_refused():
    model = with_two("LoRA")
    with pytest.raises(ValueError, match="has no adapter 'third': it has 'default', 'other'"):
        set_strength(model, "third", SCHEDULE)
    with pytest.raises(ValueError, match="TwoLayers has no adapter 'default': it has none"):
        set_strength(TwoLayers(), "default", SCHEDULE)
    with pytest.raises(ValueError, match=r"str is no torch.nn.Module"):
        set_strength("pipe", "default", SCHEDULE)  # type: ignore[arg-type]
