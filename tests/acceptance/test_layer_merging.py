"""Merging at a λ, and `to_lora` at a λ, give what the forward gives at that λ."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from nara_diffusion import noise_level, to_lora
from tests.acceptance._by_hand import (
    CORES,
    SMALL,
    WITH_DORA,
    ByHand,
    Kinds,
    adapted,
    assert_near,
    disturb,
    draw_inputs,
    leaves,
    nara_config,
    tensors_of,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Already following adapters were merged"),
]
LEVEL = 0.35
CASES = [
    ("hypernetwork", "layer", False),
    ("hypernetwork", "global", True),
    ("constant", "global", False),
    ("identity", "layer", True),
    ("knots", "module_type", True),
    ("rank_mask", "global", False),
    ("bins", "layer", True),
    ("custom", "module_type", False),
]


def make(core: str, sharing: str, use_dora: bool) -> tuple[Kinds, list[str], PeftModel]:
    """The model before it was adapted, its kinds of layers, and the adapted one."""
    kinds = [kind for kind in (WITH_DORA if use_dora else SMALL) if kind != "grouped"]  # which PEFT doesn't merge
    base = Kinds(kinds)
    options = {"target_modules": kinds, "core_sharing": sharing, "use_dora": use_dora, **CORES[core]}
    return copy.deepcopy(base), kinds, adapted(base, **options)


def run(model: nn.Module, inputs: dict[str, Tensor], level: float | None = None) -> dict[str, Tensor]:
    with torch.no_grad():
        if level is None:
            return model(inputs)
        with noise_level(model, level):
            return model(inputs)


def assert_all_near(actual: dict[str, Tensor], expected: dict[str, Tensor], **options: Any) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_near(actual[name], tensor, name, **options)


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items() if "lora_" not in n and "nara_core" not in n}


@pytest.mark.parametrize(("core", "sharing", "use_dora"), CASES, ids=str)
def test_merging_and_to_lora_give_the_forward_at_that_level_and_unmerging_restores(tmp_path, core, sharing, use_dora):
    clean, kinds, model = make(core, sharing, use_dora)
    inputs, before = draw_inputs(kinds), base_weights(model)
    expected, other = run(model, inputs, LEVEL), run(model, inputs, 0.8)
    to_lora(model, LEVEL).save_pretrained(tmp_path)
    assert_all_near(run(PeftModel.from_pretrained(clean, tmp_path).eval(), inputs), expected)
    model.merge_adapter(noise_level=LEVEL)
    assert_all_near(run(model, inputs), expected)
    model.unmerge_adapter()
    assert_all_near(base_weights(model), before)
    assert_all_near(run(model, inputs, 0.8), other)
    if core not in ("constant", "identity"):
        assert all((other[name] - expected[name]).abs().max() > 1e-3 for name in other)


@pytest.mark.parametrize("safe_merge", [False, True], ids=["merge", "safe merge"])
def test_merging_in_a_context_and_unloading_leaves_the_stock_model_with_the_weights_of_the_formula(safe_merge):
    clean, _, model = make("hypernetwork", "global", True)
    by_hand, config, tensors = ByHand(clean), model.peft_config["default"], leaves(tensors_of(model))
    with noise_level(model, LEVEL):
        merged = model.merge_and_unload(safe_merge=safe_merge)
    assert merged.state_dict().keys() == clean.state_dict().keys()
    for name in by_hand.layers:
        expected = by_hand.weights(name, config, tensors, torch.tensor([LEVEL]))[0]
        assert type(merged.get_submodule(name)) is type(clean.get_submodule(name))
        assert_near(merged.get_submodule(name).weight, expected, name)


def test_merging_without_a_level_or_running_at_another_one_is_refused():
    _, kinds, model = make("hypernetwork", "global", False)
    inputs = draw_inputs(kinds)
    with pytest.raises(ValueError, match="only be merged at one λ"):
        model.merge_adapter()
    model.merge_adapter(noise_level=LEVEL)
    for part in (model, model.base_model.model.one["linear"]):
        x = inputs if part is model else inputs["linear"]
        with noise_level(model, 0.36), pytest.raises(ValueError, match=r"merged at noise_level 0\.35"):
            part(x)


def test_merging_one_of_two_adapters_leaves_the_other_to_be_merged_beside_it():
    _, kinds, model = make("hypernetwork", "layer", False)
    model.add_adapter("knots", nara_config(target_modules=kinds, r=2, **CORES["knots"]))
    disturb(model, "knots", seed=5)
    inputs = draw_inputs(kinds)
    model.base_model.set_adapter(["default", "knots"])
    expected = run(model, inputs, LEVEL)
    model.merge_adapter(adapter_names=["knots"], noise_level=LEVEL)
    model.merge_adapter(adapter_names=["default"], noise_level=LEVEL)
    assert_all_near(run(model, inputs), expected)


def test_merging_into_half_precision_rounds_the_weights_of_the_formula_once():
    base = Kinds(["linear", "conv2d"]).bfloat16()
    by_hand = ByHand(base)
    model = adapted(base, target_modules=["linear", "conv2d"], **CORES["knots"])
    config, tensors = model.peft_config["default"], leaves(tensors_of(model))
    merged = model.merge_and_unload(noise_level=LEVEL)
    for name in by_hand.layers:
        expected = by_hand.weights(name, config, tensors, torch.tensor([LEVEL]))[0]
        assert merged.get_submodule(name).weight.dtype == torch.bfloat16
        assert_near(merged.get_submodule(name).weight, expected, name, terms=1, sums=1, dtype=torch.bfloat16)
