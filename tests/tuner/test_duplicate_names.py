"""A second adapter of one name, with other target modules, would leave layers of the first one: it is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict

from nara_diffusion import noise_level
from tests.helpers.adapted import TwoLayers, adapted, disturb, lora_config, nara_config

TARGETS = ["first", "second"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
]

MESSAGE = r"Layer 'second' of TwoLayers has an adapter 'default', which would stay beside.*unload\(\).*adapter_name="


def listed(model: TwoLayers, config: Any) -> Any:
    """By the keys of a state dict, and not by the configuration's target modules."""
    other = inject_adapter_in_model(config, TwoLayers())
    return inject_adapter_in_model(
        nara_config(target_modules=TARGETS), model, state_dict=get_peft_model_state_dict(other)
    )


SECOND: dict[str, Any] = {
    "get_peft_model": get_peft_model,
    "inject_adapter_in_model": lambda base, config: inject_adapter_in_model(config, base),
    "low_cpu_mem_usage": lambda base, config: inject_adapter_in_model(config, base, low_cpu_mem_usage=True),
    "state_dict": listed,
}


@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters, an inconsistency was discovered")
@pytest.mark.parametrize("second", SECOND.values(), ids=SECOND)
@pytest.mark.parametrize("core_type", ["hypernetwork", "identity"])
def test_one_that_would_leave_layers_is_refused_and_nothing_changes(second, core_type):
    base = TwoLayers()
    model = adapted(base, target_modules=TARGETS, core_type=core_type)
    config, state = model.peft_config["default"], {n: t.clone() for n, t in model.state_dict().items()}
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    hooks = len(base._forward_pre_hooks), len(base._forward_hooks)
    x = torch.randn(3, 7)
    with noise_level(model, 0.4):
        expected = model(x)
    with pytest.raises(ValueError, match=MESSAGE):
        second(base, nara_config(target_modules=["first"]))
    assert model.peft_config["default"] is base.peft_config["default"] is config
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trains
    assert (len(base._forward_pre_hooks), len(base._forward_hooks)) == hooks
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with noise_level(model, 0.4):
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("targets", [["first"], TARGETS])
def test_a_plain_lora_neither_stays_beside_it_nor_is_overwritten(targets):
    base = TwoLayers()
    model = get_peft_model(base, lora_config(target_modules=TARGETS))
    disturb(model)
    x = torch.randn(3, 7)
    expected = model(x)
    with pytest.raises(
        ValueError, match=r"first' of PeftModel has an adapter 'default', which would be overwritten by"
    ):
        get_peft_model(model, nara_config(target_modules=targets))
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("targets", [TARGETS, "all-linear", "first|second"])
def test_one_that_leaves_none_begins_anew_as_in_peft(tmp_path, targets):
    base = TwoLayers()
    plain = copy.deepcopy(base)
    adapted(base, target_modules=["second"])
    again = adapted(base, target_modules=targets, r=3)
    again.save_pretrained(tmp_path)
    expect_same(again, PeftModel.from_pretrained(plain, tmp_path))


def test_under_another_name_it_is_saved_and_loaded(tmp_path):
    base = TwoLayers()
    plain = copy.deepcopy(base)
    adapted(base, target_modules=TARGETS)
    second = get_peft_model(base, nara_config(target_modules=["first"]), adapter_name="other")
    disturb(second, seed=5)
    second.set_adapter("other")
    second.save_pretrained(tmp_path, selected_adapters=["other"])
    expect_same(second, PeftModel.from_pretrained(plain, tmp_path / "other"))


@pytest.mark.parametrize("take_away", ["unload", "delete_adapter"])
@pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted")
def test_after_the_first_is_removed_the_name_is_free(tmp_path, take_away):
    base = TwoLayers()
    plain = copy.deepcopy(base)
    first = adapted(base, target_modules=TARGETS)
    first.unload() if take_away == "unload" else first.delete_adapter("default")
    again = adapted(base, target_modules=["first"])
    again.save_pretrained(tmp_path)
    expect_same(again, PeftModel.from_pretrained(plain, tmp_path))


def expect_same(model: Any, loaded: Any) -> None:
    x = torch.randn(3, 7)
    with noise_level(loaded, 0.4), noise_level(model, 0.4):
        assert torch.equal(loaded.eval()(x), model.eval()(x))
