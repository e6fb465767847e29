"""A model whose last adapter has been deleted, or that has been unloaded, takes every call that PEFT's LoRA takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model

from tests.helpers.adapted import TwoLayers, disturb, lora_config, nara_config

CALLS: dict[str, Callable[[Any], Any]] = {
    "unload": lambda model: model.unload(),
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "merge_adapter": lambda model: model.merge_adapter(),
    "unmerge_adapter": lambda model: model.unmerge_adapter(),
    "disable_adapter_layers": lambda model: model.base_model.disable_adapter_layers(),
    "enable_adapter_layers": lambda model: model.base_model.enable_adapter_layers(),
    "set_adapter": lambda model: model.base_model.set_adapter([]),
    "forward": lambda model: model.base_model(torch.zeros(2, 7)),
    "forward of the whole": lambda model: model(torch.zeros(2, 7)),
    "forward of the base": lambda model: model(torch.zeros(2, 7), adapter_names=["__base__"] * 2),
    "delete_adapter": lambda model: model.base_model.delete_adapter("default"),
    "add_adapter": lambda model: model.add_adapter(
        "other", type(model.peft_config["default"])(target_modules=["first"])
    ),
    "get_model_status": lambda model: model.get_model_status(),
    "get_layer_status": lambda model: model.get_layer_status(),
}
STATES: dict[str, Callable[[Any], Any]] = {
    "deleted": lambda model: model.base_model.delete_adapter("default"),
    "unloaded": lambda model: model.unload(),
    "merged": lambda model: model.merge_and_unload(**({"noise_level": 0.3} if is_nara(model) else {})),
}


def is_nara(model: Any) -> bool:
    return model.peft_config["default"].peft_type == "NARA"


def outcome(model: Any, call: Callable[[Any], Any]) -> str:
    try:
        call(model)
    except Exception as error:  # whatever PEFT raises there
        return f"{type(error).__name__}: {error}"
    return "fine"


@pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted")
@pytest.mark.filterwarnings("ignore:Already unmerged")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
@pytest.mark.parametrize("by", ["PeftModel", "NaraModel"])
def test_a_call_that_lora_takes_is_taken(state, call, by):
    outcomes, weights = [], []
    for config in (lora_config, nara_config):
        torch.manual_seed(3)
        base = TwoLayers()
        model: Any = get_peft_model(base, config(target_modules=["first", "second"]))
        disturb(model)
        if by == "PeftModel" and state is STATES["deleted"]:
            model.delete_adapter("default")
        else:
            state(model)
        outcomes.append(outcome(model, call))
        weights.append(
            {n: t.clone() for n, t in base.state_dict().items() if "lora_" not in n and "nara_core" not in n}
        )
    assert outcomes[0] == outcomes[1]
    assert weights[0].keys() == weights[1].keys()
    if state is not STATES["merged"]:  # where NaRA's update is not LoRA's
        assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())
