"""`to_lora`: the plain LoRA of one λ, loaded by stock PEFT, against the update by hand in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from torch import nn

from nara_diffusion import StrengthSchedule, core_matrix, noise_level, register_core, set_strength, to_lora
from tests.helpers.adapted import TwoLayers, adapted, default_core, disturb, lora_config, nara_config, relative_error
from tests.helpers.core_types import Affine
from tests.helpers.exported import EXACT, assert_same_update, loaded, update_of
from tests.helpers.rounding import rounding_of

TARGETS = ["first", "second"]
LEVEL = 0.37


def base() -> TwoLayers:
    torch.manual_seed(3)
    return TwoLayers()


@torch.no_grad()
def assert_same_forward(plain: nn.Module, model: nn.Module) -> None:
    x = torch.randn(3, 7)
    with noise_level(model, LEVEL):
        wanted = model(x)
    assert relative_error(plain(x), wanted) < 4 * rounding_of(model)


def test_a_custom_core_folds(tmp_path):
    register_core("affine of export", Affine)
    model = adapted(base(), target_modules=TARGETS, core_type="affine of export")
    assert_same_forward(loaded(to_lora(model, LEVEL), tmp_path, base()), model)


def test_factors_of_half_precision_fold_in_float32_and_share_nothing_with_the_model():
    model = adapted(base(), target_modules=TARGETS).to(torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    folded = to_lora(model, LEVEL).layers["first"]
    assert (folded.A.dtype, folded.B.dtype) == (torch.bfloat16, torch.float32)
    core = default_core(model, torch.tensor([LEVEL]))[0]
    update = folded.scaling * folded.B.double() @ folded.A.double()
    assert relative_error(update, update_of(model.base_model.model.first, core=core)) < EXACT
    folded.A.zero_()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_plain_lora_has_its_strength_over_the_level(tmp_path):
    """(tests/acceptance has that of a NaRA.)"""
    patterns: dict[str, Any] = {"rank_pattern": {"second": 2}, "alpha_pattern": {"second": 5}}
    model = get_peft_model(base(), lora_config(target_modules=TARGETS, **patterns))
    disturb(model)
    set_strength(model, "default", StrengthSchedule([(0.1, 1.5), (0.6, -0.4)]))
    plain = loaded(to_lora(model, LEVEL), tmp_path, base())
    strength = 1.5 - 1.9 * (LEVEL - 0.1) / 0.5
    for name in TARGETS:
        layers = (getattr(each.base_model.model, name) for each in (plain, model))
        assert_same_update(*layers, strength * torch.eye(4, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_one_of_several_injected_adapters_folds_alone(tmp_path):
    model: Any = inject_adapter_in_model(nara_config(target_modules=["first"]), base())
    inject_adapter_in_model(nara_config(target_modules=["second"], r=3), model, "other")
    disturb(model, seed=8)
    plain = loaded(to_lora(model, LEVEL, "other"), tmp_path, base())
    core = core_matrix(model, LEVEL, "other")[0].detach()
    assert relative_error(update_of(plain.base_model.model.second), update_of(model.second, "other", core)) < EXACT
    assert not hasattr(plain.base_model.model.first, "lora_A")


def test_modules_and_biases_that_are_trained_with_it_come_along(tmp_path):
    model = adapted(base(), target_modules=["first"], modules_to_save=["second"], bias="lora_only")
    model.base_model.model.first.base_layer.bias.data.normal_()
    assert_same_forward(loaded(to_lora(model, LEVEL), tmp_path, base()), model)


def test_the_level_of_the_context_and_that_of_a_merge_count():
    model = adapted(base(), target_modules=TARGETS)
    expected = to_lora(model, LEVEL).state_dict()
    with noise_level(model, LEVEL):
        inside = to_lora(model).state_dict()
    model.merge_adapter(noise_level=LEVEL)
    merged = to_lora(model).state_dict()
    for key, tensor in expected.items():
        assert torch.equal(inside[key], tensor)
        assert torch.equal(merged[key], tensor)


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({}, {}, "pass noise_level|Pass noise_level"),
        ({}, {"noise_level": 1.5}, "1.5"),
        ({}, {"noise_level": "mean"}, "best"),
        ({}, {"noise_level": LEVEL, "adapter_name": "other"}, "has no adapter 'other'"),
        ({"lora_bias": True}, {"noise_level": LEVEL}, "biases of B"),
    ],
)
def test_what_is_no_lora_of_one_level_is_refused(options, arguments, message):
    with pytest.raises(ValueError, match=message):
        to_lora(adapted(base(), **{"target_modules": TARGETS, **options}), **arguments)
