"""NaRA on base layers that are more than a frozen weight: with C = I, all that PEFT's LoRA gives on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, PeftConfig, VeraConfig, get_peft_model
from torch import nn
from torch.nn.utils import prune, spectral_norm, weight_norm

from tests.helpers.adapted import TwoLayers
from tests.helpers.layers.beside_lora import TARGETS, assert_alike, beside_lora, outcome

# ---------------------------------------------------------------------- another tuner of PEFT's below


def tuned_by(config: PeftConfig) -> nn.Module:
    """Two layers that another tuner has adapted, and not by nothing."""
    model: Any = get_peft_model(TwoLayers(), config).base_model.model
    del model.peft_config  # or PEFT warns of the second tuner
    for name, parameter in model.named_parameters():
        if any(part in name for part in OTHER_TUNERS):
            parameter.data = torch.randn_like(parameter)
    return model


OTHER_TUNERS = ("vera_lambda", "ia3_l", "hada_")
TUNED: dict[str, Callable[[], nn.Module]] = {
    "VeRA": lambda: tuned_by(VeraConfig(r=4, target_modules=TARGETS, vera_dropout=0.0)),
    "IA3": lambda: tuned_by(IA3Config(target_modules=TARGETS, feedforward_modules=[])),
    "IA3 of inputs": lambda: tuned_by(IA3Config(target_modules=TARGETS, feedforward_modules=TARGETS)),
    "LoHa": lambda: tuned_by(LoHaConfig(r=2, target_modules=TARGETS)),
}


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.parametrize("use_dora", [False, True], ids=["NaRA", "NaRA-DoRA"])
@pytest.mark.parametrize("inner_trains", [False, True], ids=["", "inner trains"])
@pytest.mark.parametrize("make", TUNED.values(), ids=TUNED)
def test_on_another_tuner_outputs_and_gradients_are_those_of_lora(make, inner_trains, use_dora):
    theirs, ours = beside_lora(make, trained=OTHER_TUNERS if inner_trains else (), use_dora=use_dora)
    x = torch.randn(3, 6, 7)
    expected = outcome(theirs, x)
    assert any(part in name for name in expected for part in OTHER_TUNERS) == inner_trains
    assert_alike(expected, outcome(ours, x))


# ---------------------------------------------------------------------- a weight that is no parameter


def made_by(change: Callable[[nn.Linear], Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = TwoLayers()
        change(model.first)
        change(model.second)
        return model

    return make


REPARAMETRISED = {
    "prune": made_by(lambda layer: prune.l1_unstructured(layer, "weight", 0.3)),
    "prune the bias": made_by(lambda layer: prune.l1_unstructured(layer, "bias", 0.3)),
    "weight_norm": made_by(weight_norm),
    "spectral_norm": made_by(spectral_norm),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("use_dora", [False, True], ids=["NaRA", "NaRA-DoRA"])
@pytest.mark.parametrize("base_trains", [False, True], ids=["", "base trains"])
@pytest.mark.parametrize("make", REPARAMETRISED.values(), ids=REPARAMETRISED)
def test_where_the_weight_is_no_parameter_outputs_and_gradients_are_those_of_lora(make, base_trains, use_dora):
    trained = ("weight_orig", "weight_g", "weight_v", "bias") if base_trains else ()
    theirs, ours = beside_lora(make, trained=trained, use_dora=use_dora)
    x = torch.randn(3, 6, 7)
    assert_alike(outcome(theirs, x), outcome(ours, x))


@pytest.mark.parametrize("use_dora", [False, True], ids=["NaRA", "NaRA-DoRA"])
@pytest.mark.parametrize("names", [("weight", "bias"), ("weight",), ("bias",)], ids="-".join)
def test_tensors_that_stand_in_for_parameters_get_their_gradients(names, use_dora):
    """As under FSDP1, where they are views of a parameter elsewhere."""
    results = []
    for model in beside_lora(TwoLayers, use_dora=use_dora):
        views = {name: unregistered(model.base_model.model.second.base_layer, name) for name in names}
        results.append(outcome(model, torch.linspace(-1, 1, 3 * 6 * 7).view(3, 6, 7)))
        results[-1] |= {name: view.grad for name, view in views.items()}
    assert_alike(*results)


def unregistered(layer: nn.Linear, name: str) -> torch.Tensor:
    """The layer's parameter of that name as a mere tensor."""
    parameter = layer._parameters.pop(name)
    assert parameter is not None
    tensor = parameter.detach().requires_grad_()
    setattr(layer, name, tensor)
    return tensor


@pytest.mark.parametrize("use_dora", [False, True], ids=["NaRA", "NaRA-DoRA"])
def test_factors_that_are_no_parameters_get_their_gradients(use_dora):
    results = []
    for model in beside_lora(TwoLayers, use_dora=use_dora):
        layer = model.base_model.model.second
        factors = {name: unregistered(getattr(layer, name)["outer"], "weight") for name in ("lora_A", "lora_B")}
        results.append(outcome(model, torch.linspace(-1, 1, 3 * 6 * 7).view(3, 6, 7)))
        results[-1] |= {name: factor.grad for name, factor in factors.items()}
    assert_alike(*results)
