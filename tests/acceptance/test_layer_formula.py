"""Every kind of layer, with NaRA and NaRA-DoRA and every type of core, follows the formula, with LoRA's options.

One forward covers two layers of each kind. The cases are pairs of core type and variant; each type meets two or three
ways of sharing. A new core is PEFT's LoRA; scales, ranks, dropout and several adapters are PEFT's.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from nara_diffusion import core_matrix, noise_level
from tests.acceptance._by_hand import (
    ALPHA,
    CORES,
    LEVELS,
    RANK,
    SMALL,
    WIDE,
    WITH_DORA,
    ByHand,
    Kinds,
    adapted,
    assert_near,
    core_by_hand,
    disturb,
    draw_inputs,
    leaves,
    nara_config,
    tensors_of,
    write,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
]

CASES: list[tuple[str, str, bool, Any]] = [
    ("hypernetwork", "global", False, LEVELS),
    ("hypernetwork", "module_type", True, LEVELS),
    ("hypernetwork", "layer", False, 0.4),
    ("constant", "layer", True, LEVELS),
    ("identity", "global", False, LEVELS),
    ("knots", "layer", True, 0.4),
    ("knots", "module_type", False, LEVELS),
    ("rank_mask", "global", True, LEVELS),
    ("bins", "layer", False, LEVELS),
    ("bins", "global", True, LEVELS),
    ("custom", "module_type", False, LEVELS),
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


@pytest.mark.parametrize(("core", "sharing", "use_dora", "level"), CASES, ids=str)
def test_layers_follow_the_formula_forward_and_backward(core, sharing, use_dora, level):
    kinds = WITH_DORA if use_dora else SMALL
    model, by_hand = make(kinds, use_dora=use_dora, core_sharing=sharing, **CORES[core])
    assert_follows_formula(model, by_hand, level, terms=64)


@pytest.mark.parametrize("use_dora", [False, True], ids=["NaRA", "NaRA-DoRA"])
@pytest.mark.parametrize("level", [0.4, LEVELS], ids=["one level", "a level per sample"])
def test_fused_layers_follow_the_formula_forward_and_backward(use_dora, level, monkeypatch):
    """Large ones, and others as if they were."""
    kinds = [*WIDE, "linear", "bare", "deep"]
    model, by_hand = make(kinds, use_dora=use_dora)
    monkeypatch.setattr("nara_diffusion.layers.fused.MIN_ELEMENTS", 0)
    assert_follows_formula(model, by_hand, level, terms=896)


def test_sample_without_batch_axis_is_a_batch_of_one():
    for kinds in (["bare", "conv1d", "conv2d"], ["grouped", "conv3d"]):
        model, inputs = adapted(Kinds(kinds), target_modules=kinds, use_dora="bare" in kinds), draw_inputs(kinds)
        with noise_level(model, 0.3):
            found, whole = model({kind: x[0] for kind, x in inputs.items()}), model(inputs)
        for name, output in found.items():
            assert_near(output, whole[name][0], name)


KINDS = ["linear", "bare", "conv1d", "conv2d"]
PADDED = "padded_embedding"


def loss_of(outputs: dict[str, Tensor]) -> Tensor:
    return sum((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() for y in outputs.values())


def pair(*options: dict[str, Any], disturbed: bool = True) -> tuple[nn.Module, nn.Module]:
    """PEFT's adapters, and NaRAs with C = I, of equal weights, all active."""
    bases, names, models = (Kinds([*KINDS, PADDED]), Kinds([*KINDS, PADDED])), ["default", "second"][: len(options)], []
    bases[1].load_state_dict(bases[0].state_dict())
    for base, kind in zip(bases, (LoraConfig, nara_config), strict=True):
        configs = [kind(**{"r": RANK, "lora_alpha": ALPHA, "target_modules": KINDS, **each}) for each in options]
        models.append(get_peft_model(base, configs[0]))
        for name, config in zip(names[1:], configs[1:], strict=True):
            models[-1].add_adapter(name, config)
        models[-1].base_model.set_adapter(names)
    for seed, name in enumerate(names, start=1):
        if disturbed:
            disturb(models[0], name, seed)
        write(models[1], tensors_of(models[0], name), name)
    return tuple(models)


DORA, DROPOUT = {"use_dora": True}, {"lora_dropout": 0.4}


@pytest.mark.parametrize(
    "options",
    [
        (DROPOUT | {"target_modules": [*KINDS, PADDED]},),
        (DORA | DROPOUT,),
        (DORA, {"r": 2}),
        ({}, DORA | {"r": 2}),
        (DORA, DORA | {"r": 2}),
    ],
    ids=str,
)
def test_new_cores_give_the_outputs_and_gradients_of_pefts_adapters(options):
    theirs, ours = pair(*options)
    ids, inputs, found = draw_inputs([PADDED]), draw_inputs(KINDS), []
    for model in (theirs.train(), ours.train()):
        xs = {kind: x.detach().clone().requires_grad_() for kind, x in inputs.items()}
        torch.manual_seed(4)
        with noise_level(ours, LEVELS):
            outputs = model(xs | ids)
        loss_of(outputs).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and "nara_core" not in n}
        found.append({**outputs, **gradients, **{f"input of {kind}": x.grad for kind, x in xs.items()}})
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        assert_near(found[1][name], expected, name, sums=20)


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
def test_first_steps_of_training_are_those_of_pefts_adapter(use_dora):
    theirs, ours = pair({"use_dora": use_dora}, disturbed=False)
    inputs, held = draw_inputs([*KINDS, PADDED]), {}
    with torch.no_grad(), theirs.disable_adapter():
        base = theirs(inputs)
    for model in (theirs, ours):
        with noise_level(ours, LEVELS):
            outputs = model(inputs)
            for name, y in outputs.items():
                assert_near(y, base[name], f"{name} at step 0")
            loss_of(outputs).backward()
            torch.optim.SGD(model.parameters(), lr=0.1).step()
        held[model] = tensors_of(model)
    for name, expected in held[theirs].items():
        assert_near(held[ours][name], expected, name, sums=20)
    assert torch.equal(core_matrix(ours, LEVELS), torch.eye(RANK).expand(3, -1, -1))  # B was zero: no gradient yet


@pytest.mark.parametrize("core", ["hypernetwork", "knots", "rank_mask", "bins"])
def test_patterns_and_rslora_scale_each_layer_and_a_smaller_rank_reads_the_leading_block(core):
    base = Kinds(["linear", "conv1d"])
    by_hand, inputs = ByHand(base), draw_inputs(["linear", "conv1d"])
    ranks, alphas = {"one.linear": 2, "two.conv1d": 6}, {"two.linear": 3, "one.linear": 5}
    model = adapted(
        base,
        target_modules=["linear", "conv1d"],
        use_rslora=True,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        **CORES[core],
    )
    config, tensors = model.peft_config["default"], leaves(tensors_of(model))
    own = {n.removeprefix("nara_core.shared."): t for n, t in tensors.items() if "nara_core" in n}
    with noise_level(model, LEVELS):
        outputs = model(inputs)
    for name, output in outputs.items():
        rank = ranks.get(name, RANK)
        if core in ("rank_mask", "bins"):  # a mask of that rank
            C = core_by_hand(config, own, LEVELS, rank)
        else:
            C = core_by_hand(config, own, LEVELS, 6)[:, :rank, :rank]
        scaling = alphas.get(name, ALPHA) / rank**0.5
        weights = by_hand.weights(name, config, tensors, LEVELS, scaling=scaling, core=C)
        assert_near(output, by_hand.output(name, weights, inputs[name.split(".")[1]]), name)


def test_several_active_adapters_add_up_each_with_its_own_core_scale_and_gradients():
    kinds = ["linear", "conv2d", "wide"]
    base = Kinds(kinds)
    by_hand, inputs = ByHand(base), draw_inputs(kinds)
    model = adapted(base, target_modules=kinds)
    others = {"knots": {"r": 2, **CORES["knots"]}, "plain": {"r": 3, **CORES["identity"]}, "idle": {}}
    for seed, (name, options) in enumerate(others.items()):
        model.add_adapter(name, nara_config(target_modules=kinds, **options))
        disturb(model, name, seed=seed)
    active = ["default", "knots", "plain"]
    model.base_model.set_adapter(active)
    with noise_level(model, LEVELS):
        outputs = model(inputs)
    loss_of(outputs).backward()
    held, expected = {name: leaves(tensors_of(model, name)) for name in active}, {}
    for layer, output in outputs.items():
        plain = by_hand.layers[layer].weight
        weights = plain.expand(len(LEVELS), *plain.shape)
        for name, tensors in held.items():
            config = model.peft_config[name]
            weights = weights + by_hand.weights(layer, config, tensors, LEVELS, scaling=ALPHA / config.r) - plain
        expected[layer] = by_hand.output(layer, weights, inputs[layer.split(".")[1]])
        assert_near(output, expected[layer], layer, terms=896)
    loss_of(expected).backward()
    for name, tensors in held.items():
        gradients = tensors_of(model, name, gradients=True)
        assert gradients.keys() == {n for n, t in tensors.items() if t.grad is not None and "freq" not in n}
        for key, gradient in gradients.items():
            assert_near(gradient, tensors[key].grad, f"gradient of {key} of {name}", terms=896, sums=20)
