"""Every kind of layer, with NaRA and NaRA-DoRA and every type of core, follows the formula, with LoRA's options.

One forward covers two layers of each kind. The cases are pairs of core type and variant; each type meets two or three
ways of sharing. A new core is PEFT's LoRA; scales, ranks, dropout and several adapters are PEFT's.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import get_peft_model

from nara_diffusion import noise_level
from tests.acceptance._by_hand import CORES, LEVELS, SMALL, ByHand, Kinds, assert_near, leaves, tensors_of, write
from tests.helpers.adapted import adapted, disturb, lora_config, nara_config

pytestmark = [
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
]

CASES: list[tuple[str, str, bool, Any, bool]] = [
    ("hypernetwork", "global", False, LEVELS, False),
    ("hypernetwork", "module_type", True, LEVELS, False),
    ("hypernetwork", "layer", False, 0.4, False),
    ("constant", "layer", True, LEVELS, False),
    ("identity", "global", False, LEVELS, False),
    ("knots", "layer", True, 0.4, False),
    ("knots", "module_type", False, LEVELS, False),
    ("rank_mask", "global", True, LEVELS, False),
    ("bins", "layer", False, LEVELS, False),
    ("custom", "module_type", False, LEVELS, False),
    *(("hypernetwork", "global", use_dora, level, True) for use_dora in (False, True) for level in (0.4, LEVELS)),
]


@pytest.mark.parametrize(("core", "sharing", "use_dora", "level", "fused"), CASES, ids=str)
def test_layers_follow_the_formula_forward_and_backward(core, sharing, use_dora, level, fused, monkeypatch):
    """Outputs, and gradients of inputs, A, B, magnitudes, cores, and of base weights that are trained beside them.

    Large layers are fused, and others as if they were.
    """
    kinds, terms = SMALL[use_dora], 64
    if fused:
        kinds, terms = ["wide", "wide_trained", "linear", "bare"], 896
    base = Kinds(kinds)
    by_hand = ByHand(base, trained="trained")
    model = adapted(base, target_modules=kinds, use_dora=use_dora, core_sharing=sharing, **CORES[core])
    base_layers = {name: model.base_model.model.get_submodule(name).get_base_layer() for name in by_hand.layers}
    for name, layer in base_layers.items():
        layer.requires_grad_("trained" in name)
    inputs = base.inputs()
    with noise_level(model, level):
        outputs = model(inputs)
    weightings = {name: torch.randn(output.shape) for name, output in outputs.items()}
    sum((outputs[name] * weighting).sum() for name, weighting in weightings.items()).backward()

    tensors, xs = leaves(tensors_of(model)), leaves({kind: x for kind, x in inputs.items() if x.is_floating_point()})
    expected = by_hand.outputs(model.peft_config["default"], tensors, {**inputs, **xs}, level)
    for name, output in expected.items():
        assert_near(outputs[name], output, name, terms=terms)
    sum((expected[name] * weighting).sum() for name, weighting in weightings.items()).backward()

    gradients = tensors_of(model, gradients=True)
    reached = {name for name, tensor in tensors.items() if tensor.grad is not None}
    assert gradients.keys() == {name for name in reached if "freq" not in name}
    for name, gradient in gradients.items():
        assert_near(gradient, tensors[name].grad, f"gradient of {name}", terms=terms, sums=20)
    for kind, x in xs.items():
        assert_near(inputs[kind].grad, x.grad, f"gradient of the input of {kind}", terms=terms, sums=20)
    for name, layer in by_hand.layers.items():
        assert (base_layers[name].weight.grad is None) == (layer.weight.grad is None), name
        if layer.weight.grad is not None:
            assert_near(
                base_layers[name].weight.grad, layer.weight.grad, f"gradient of W0 of {name}", terms=terms, sums=20
            )


def test_sample_without_batch_axis_is_batch_of_one():
    for kinds in (["bare", "conv1d", "conv2d"], ["grouped", "conv3d"]):
        base = Kinds(kinds)
        model, inputs = adapted(base, target_modules=kinds, use_dora="bare" in kinds), base.inputs()
        with noise_level(model, 0.3):
            actual, full = model({kind: x[0] for kind, x in inputs.items()}), model(inputs)
        for name, output in actual.items():
            assert_near(output, full[name][0], name)


KINDS, PADDED = ["linear", "bare", "conv1d", "conv2d"], "padded_embedding"
DORA, DROPOUT = {"use_dora": True}, {"lora_dropout": 0.4}


@pytest.mark.parametrize(
    "options",
    [
        (DROPOUT | {"target_modules": [*KINDS, PADDED]},),
        (DORA | DROPOUT,),
        (DORA, {"r": 2}),
        ({}, DORA | {"r": 2}),
        (DORA, DORA | {"r": 2}),
        ({"lora_bias": True, "target_modules": ["linear", "conv2d"]},),
    ],
    ids=str,
)
def test_new_cores_give_peft_outputs_and_gradients(options):
    """One adapter or two active ones, of equal weights, whose C = I."""
    base, names = Kinds([*KINDS, PADDED]), ["default", "second"][: len(options)]
    inputs, tensors, tensors_of_models = base.inputs(), {}, []
    for make in (lora_config, nara_config):
        configs = [make(**{"target_modules": KINDS, **option}) for option in options]
        model = get_peft_model(copy.deepcopy(base), configs[0]).train()
        for name, config in zip(names[1:], configs[1:], strict=True):
            model.add_adapter(name, config)
        model.base_model.set_adapter(names)
        for seed, name in enumerate(names, start=1):
            if make is lora_config:
                disturb(model, name, seed)
                tensors[name] = tensors_of(model, name)
            else:
                write(model, tensors[name], name)
        xs = {kind: x.detach().clone().requires_grad_(x.is_floating_point()) for kind, x in inputs.items()}
        torch.manual_seed(4)
        with nullcontext() if make is lora_config else noise_level(model, LEVELS):
            outputs = model(xs)
        sum((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() for y in outputs.values()).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and "lora_core" not in n}
        tensors_of_models.append({**outputs, **gradients, **{f"input of {kind}": xs[kind].grad for kind in KINDS}})
    assert tensors_of_models[0].keys() == tensors_of_models[1].keys()
    for name, expected in tensors_of_models[0].items():
        assert_near(tensors_of_models[1][name], expected, name, sums=20)


@pytest.mark.parametrize("core", ["hypernetwork", "knots", "rank_mask", "bins"])
def test_patterns_and_rslora_scale_layers_and_smaller_ranks(core):
    base = Kinds(["linear", "conv1d"])
    by_hand, inputs = ByHand(base), base.inputs()
    patterns = {
        "rank_pattern": {"one.linear": 2, "two.conv1d": 6},
        "alpha_pattern": {"two.linear": 3, "one.linear": 5},
    }
    model = adapted(base, target_modules=["linear", "conv1d"], use_rslora=True, **patterns, **CORES[core])
    with noise_level(model, LEVELS):
        outputs = model(inputs)
    expected = by_hand.outputs(model.peft_config["default"], leaves(tensors_of(model)), inputs, LEVELS)
    for name, output in outputs.items():
        assert_near(output, expected[name], name)
