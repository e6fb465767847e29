"""Every kind of layer, with NaRA and NaRA-DoRA and every type of core, follows the formula in float64.

One forward covers two layers of each kind. The cases are pairs of core type and variant; each type meets two or three
ways of sharing.
"""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from nara_diffusion import noise_level
from tests.acceptance._by_hand import (
    CORES,
    LEVELS,
    SMALL,
    WIDE,
    WITH_DORA,
    ByHand,
    Kinds,
    adapted,
    assert_near,
    draw_inputs,
    leaves,
    tensors_of,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
]

CASES = [
    ("hypernetwork", "global", False),
    ("hypernetwork", "module_type", True),
    ("hypernetwork", "layer", False),
    ("constant", "module_type", False),
    ("constant", "layer", True),
    ("identity", "global", True),
    ("identity", "layer", False),
    ("knots", "layer", True),
    ("knots", "global", False),
    ("rank_mask", "global", True),
    ("rank_mask", "layer", False),
    ("bins", "module_type", False),
    ("bins", "global", True),
    ("custom", "global", True),
    ("custom", "module_type", False),
]


def make(kinds: list[str], **options: object) -> tuple[PeftModel, ByHand]:
    """Layers of these kinds with an adapter; the own weights of some are trained beside it."""
    base = Kinds(kinds)
    by_hand = ByHand(base, trained="trained")
    model = adapted(base, target_modules=kinds, **options)
    for name in by_hand.layers:
        layer = model.base_model.model.get_submodule(name)
        layer.get_base_layer().requires_grad_("trained" in name)
    return model, by_hand


def assert_follows_formula(model: PeftModel, by_hand: ByHand, level: Tensor | float, terms: int) -> None:
    """Outputs, and gradients of inputs, A, B, magnitudes, cores and trained base weights."""
    config, kinds = model.peft_config["default"], model.base_model.model.one.keys()
    inputs = draw_inputs(kinds)
    with noise_level(model, level):
        outputs = model(inputs)
    weightings = {name: torch.randn(output.shape) for name, output in outputs.items()}
    sum((outputs[name] * weighting).sum() for name, weighting in weightings.items()).backward()

    tensors, xs = leaves(tensors_of(model)), leaves({kind: x for kind, x in inputs.items() if x.is_floating_point()})
    losses = []
    for name, weighting in weightings.items():
        x = xs.get(name.split(".")[1], inputs[name.split(".")[1]])
        weights = by_hand.weights(name, config, tensors, torch.as_tensor(level).expand(len(x)))
        expected = by_hand.output(name, weights, x)
        assert_near(outputs[name], expected, name, terms=terms)
        losses.append((expected * weighting).sum())
    sum(losses).backward()

    gradients = tensors_of(model, gradients=True)
    reached = {name for name, tensor in tensors.items() if tensor.grad is not None}
    assert gradients.keys() == {name for name in reached if "freq" not in name}
    for name, gradient in gradients.items():
        assert_near(gradient, tensors[name].grad, f"gradient of {name}", terms=terms, sums=20)
    for kind, x in xs.items():
        assert_near(inputs[kind].grad, x.grad, f"gradient of the input of {kind}", terms=terms, sums=20)
    for name, layer in by_hand.layers.items():
        own = model.base_model.model.get_submodule(name).get_base_layer().weight.grad
        assert (own is None) == (layer.weight.grad is None), name
        if own is not None:
            assert_near(own, layer.weight.grad, f"gradient of W0 of {name}", terms=terms, sums=20)


@pytest.mark.parametrize(("core", "sharing", "use_dora"), CASES, ids=str)
def test_layers_with_a_level_per_sample_follow_the_formula_forward_and_backward(core, sharing, use_dora):
    kinds = WITH_DORA if use_dora else SMALL
    model, by_hand = make(kinds, use_dora=use_dora, core_sharing=sharing, **CORES[core])
    assert_follows_formula(model, by_hand, LEVELS, terms=64)


@pytest.mark.parametrize("use_dora", [False, True], ids=["NaRA", "NaRA-DoRA"])
def test_layers_with_one_level_for_the_batch_follow_the_formula_forward_and_backward(use_dora):
    model, by_hand = make(WITH_DORA if use_dora else SMALL, use_dora=use_dora)
    assert_follows_formula(model, by_hand, 0.4, terms=64)


@pytest.mark.parametrize("use_dora", [False, True], ids=["NaRA", "NaRA-DoRA"])
@pytest.mark.parametrize("level", [0.4, LEVELS], ids=["one level", "a level per sample"])
def test_large_layers_follow_the_formula_forward_and_backward(use_dora, level):
    model, by_hand = make(WIDE, use_dora=use_dora)
    assert_follows_formula(model, by_hand, level, terms=896)
