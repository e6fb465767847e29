"""A and B whose weight is made anew for each call, or whose call is watched: outputs, gradients, training, merging."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import nara_diffusion.layers.dora as dora_layers
import nara_diffusion.layers.variants as variants
from nara_diffusion import noise_level
from tests.helpers.adapted import TwoLayers, adapted, default_core, relative_error
from tests.helpers.layers.beside_lora import LEVELS, TARGETS, assert_alike, beside_lora, outcome

pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")


class TwoConvolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(7, 11, 3, padding=1, stride=2)
        self.second = nn.Conv2d(11, 5, (1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def halve_output(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda module, args, output: output / 2)


def double_input(layer: nn.Module) -> None:
    layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def reverse_forward(layer: nn.Module) -> None:
    forward = layer.forward
    layer.forward = lambda x: -forward(x)


PRUNED = {"prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5)}
NORMED = {
    "weight_norm": lambda layer: weight_norm(layer),
    "parametrized weight_norm": parametrizations.weight_norm,
    "spectral_norm": lambda layer: spectral_norm(layer),
    "parametrized spectral_norm": parametrizations.spectral_norm,
}
WATCHED = {"forward hook": halve_output, "forward pre-hook": double_input, "own forward": reverse_forward}
REMADE = PRUNED | NORMED
LINEAR, CONVOLUTION = (TwoLayers, (3, 6, 7)), (TwoConvolutions, (3, 7, 6, 5))

dora = pytest.mark.parametrize("use_dora", [False, True], ids=["NaRA", "NaRA-DoRA"])
which = pytest.mark.parametrize("which", [("lora_A",), ("lora_B",), ("lora_A", "lora_B")], ids="-".join)


def change_factors(model: Any, change: Callable[[nn.Module], Any], which: tuple[str, ...], adapter: str) -> None:
    torch.manual_seed(5)
    for name in TARGETS:
        for factor in which:
            change(getattr(getattr(model.base_model.model, name), factor)[adapter])


@pytest.mark.parametrize("change", (REMADE | WATCHED).values(), ids=REMADE | WATCHED)
@which
@dora
def test_factors_of_linear_layers_that_are_remade_or_watched_give_what_pefts_lora_gives(change, which, use_dora):
    theirs, ours = beside_lora(TwoLayers, use_dora=use_dora)
    x = torch.randn(3, 6, 7)
    for model in (theirs, ours):
        change_factors(model.eval().double(), change, which, "outer")
    assert_alike(outcome(theirs, x.double()), outcome(ours, x.double()))


@pytest.mark.parametrize("change", (REMADE | WATCHED).values(), ids=REMADE | WATCHED)
@which
def test_factors_of_convolutions_that_are_remade_or_watched_give_what_pefts_lora_gives(change, which):
    theirs, ours = beside_lora(TwoConvolutions)
    x = torch.randn(3, 7, 6, 5)
    for model in (theirs, ours):
        change_factors(model.eval().double(), change, which, "outer")
    assert_alike(outcome(theirs, x.double()), outcome(ours, x.double()))


# ---------------------------------------------------------------------- what is trained, at a λ for each sample


def remade_weight(layer: nn.Module) -> Tensor:
    """The weight of a pruned or normed layer from its parameters, float64."""
    own = {name: tensor.detach().double() for name, tensor in layer.state_dict().items()}
    if "weight_orig" in own and "weight_mask" in own:
        return own["weight_orig"] * own["weight_mask"]
    if "weight_v" in own:
        v, g = own["weight_v"], own["weight_g"]
    else:
        g, v = own["parametrizations.weight.original0"], own["parametrizations.weight.original1"]
    return g * v / v.flatten(1).norm(dim=1).view(-1, *(1,) * (v.dim() - 1))


def by_hand(model: Any, x: Tensor, core: Tensor, use_dora: bool) -> Tensor:
    """Two adapted layers at C (b, r, r), each sample with its own materialised weight, float64."""
    for name in TARGETS:
        layer = getattr(model.base_model.model, name)
        base, s = layer.get_base_layer(), layer.scaling["default"]
        A, B = remade_weight(layer.lora_A["default"]), remade_weight(layer.lora_B["default"])
        W = base.weight.double() + s * torch.einsum("or,brq,q...->bo...", B.flatten(1), core, A)
        if use_dora:
            magnitude = layer.lora_magnitude_vector["default"].weight.double().flatten()
            dora_scale = magnitude / W.flatten(2).norm(dim=2)  # (b, d_out)
            W = W * dora_scale.view(*dora_scale.shape, *(1,) * (W.dim() - 2))
        bias = base.bias.double()
        if isinstance(base, nn.Linear):
            x = torch.einsum("bli,boi->blo", x.double(), W) + bias
        else:
            samples = zip(x.double().split(1), W, strict=True)
            x = torch.cat([F.conv2d(one, w, bias, base.stride, base.padding) for one, w in samples])
        x = torch.tanh(x) if name == "first" else x
    return x


def trained_for_a_step(change: Any, make: Any, shape: tuple[int, ...], use_dora: bool) -> tuple[Any, Tensor]:
    """A model with remade factors after two steps of Adam, the last of which no forward has seen, and an input."""
    model = adapted(make(), target_modules=TARGETS, use_dora=use_dora)
    change_factors(model, change, ("lora_A", "lora_B"), "default")
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x = torch.randn(shape)
    for _ in range(2):
        with noise_level(model, LEVELS):
            model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, x


FORMULAS = {name: change for name, change in REMADE.items() if "spectral" not in name}
KINDS = pytest.mark.parametrize(("make", "shape"), [LINEAR, CONVOLUTION], ids=["linear", "convolution"])


@pytest.mark.parametrize("change", FORMULAS.values(), ids=FORMULAS)
@KINDS
@dora
def test_remade_factors_after_training_steps_give_the_formula(change, make, shape, use_dora):
    model, x = trained_for_a_step(change, make, shape, use_dora)
    with noise_level(model, LEVELS):
        assert relative_error(model(x), by_hand(model, x, default_core(model, LEVELS), use_dora)) < 2e-5


@pytest.mark.parametrize("change", NORMED.values(), ids=NORMED)
@dora
def test_normed_factors_in_training_mode_can_be_trained(change, use_dora):
    model = adapted(TwoLayers(), target_modules=TARGETS, use_dora=use_dora).train()
    change_factors(model, change, ("lora_A", "lora_B"), "default")
    for _ in range(3):
        with noise_level(model, LEVELS):
            model(torch.randn(3, 6, 7)).square().sum().backward()
    assert all(p.grad is not None and p.grad.count_nonzero() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("change", FORMULAS.values(), ids=FORMULAS)
@KINDS
@dora
def test_merging_remade_factors_after_training_steps_gives_the_formula(change, make, shape, use_dora):
    model, x = trained_for_a_step(change, make, shape, use_dora)
    expected = by_hand(model, x, default_core(model, torch.full((3,), 0.3)), use_dora)
    before = copy.deepcopy({name: t for name, t in model.state_dict().items() if "base_layer" in name})
    model.merge_adapter(noise_level=0.3)
    assert relative_error(model(x), expected) < 2e-5
    model.unmerge_adapter()
    for name, tensor in before.items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", WATCHED.values(), ids=WATCHED)
@dora
def test_merging_watched_factors_of_linear_layers_gives_their_forward(change, use_dora):
    model = adapted(TwoLayers(), target_modules=TARGETS, use_dora=use_dora)
    change_factors(model, change, ("lora_A", "lora_B"), "default")
    x = torch.randn(3, 6, 7)
    with noise_level(model, 0.3):
        expected = model(x)
    model.merge_adapter(noise_level=0.3)
    assert relative_error(model(x), expected) < 1e-5


def test_merging_spectral_normed_factors_in_training_mode_is_undone_exactly():
    """Each call in training mode makes another weight: what is taken out is what was put in."""
    model = adapted(TwoLayers(), target_modules=TARGETS).train()
    change_factors(model, spectral_norm, ("lora_A", "lora_B"), "default")
    before = model.base_model.model.first.base_layer.weight.clone()
    model.merge_adapter(noise_level=0.3)
    assert relative_error(model.base_model.model.first.base_layer.weight, before) > 0.01
    model(torch.randn(3, 6, 7))
    model.unmerge_adapter()
    assert relative_error(model.base_model.model.first.base_layer.weight, before) < 1e-6


# ---------------------------------------------------------------------- who sees which calls


@dora
def test_a_hook_of_all_modules_sees_the_calls_of_both_factors(use_dora):
    model = adapted(TwoLayers(), target_modules=TARGETS, use_dora=use_dora)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module))
    try:
        with noise_level(model, LEVELS):
            model(torch.randn(3, 6, 7))
    finally:
        handle.remove()
    for name in TARGETS:
        layer = getattr(model.base_model.model, name)
        assert seen.count(layer.lora_A["default"]) == seen.count(layer.lora_B["default"]) == 1


@pytest.mark.parametrize("change", (REMADE | WATCHED).values(), ids=REMADE | WATCHED)
@which
@dora
def test_watched_or_remade_factors_are_not_fused(monkeypatch, change, which, use_dora):
    model = adapted(TwoLayers(), target_modules=TARGETS, use_dora=use_dora)
    change_factors(model, change, which, "default")
    for module in (variants, dora_layers):
        monkeypatch.setattr(module, "fused_linear", lambda *args: pytest.fail("fused"))
    with noise_level(model, LEVELS):
        model(torch.randn(3, 6, 7)).sum().backward()
