"""Linear layers as one autograd function: what it computes, and when a layer is computed step by step instead."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from nara_diffusion import noise_level
from nara_diffusion.layers import dora, functional, variants
from nara_diffusion.noise.context import find_holders
from tests.acceptance._by_hand import LEVELS
from tests.helpers.adapted import OneLayer, adapted, exact_core, nara_config, relative_error

DORA = pytest.mark.parametrize("use_dora", [False, True], ids=["NaRA", "NaRA-DoRA"])


def one_layer(use_dora: bool) -> Any:
    return adapted(OneLayer(nn.Linear(7, 5)), target_modules=["layer"], use_dora=use_dora)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry for each layer that ran as one function: True if W0's gradient of x was made there too."""
    is_fused: list[bool] = []

    def counted(x: Tensor, result: Tensor, base: Any, *args: Any) -> Tensor:
        is_fused.append(base is not None)
        return functional.linear_in_one(x, result, base, *args)

    for room in (variants, dora):
        monkeypatch.setattr(room, "linear_in_one", counted)
    return is_fused


@DORA
def test_fused_layer_gives_frozen_tensors_no_gradient(calls: list[bool], use_dora: bool) -> None:
    model, x, gradients_of_both = one_layer(use_dora), torch.randn(3, 4, 7, requires_grad=True), []
    for frozen in (("none",), ("lora_A", "core"), ("lora_B",), ("magnitude",)):  # a core is trained where A is
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(part in name for part in ("base_layer", *frozen)))
        model.zero_grad()
        x.grad = None
        with noise_level(model, LEVELS):
            output = model(x)
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        gradients_of_both.append({**gradients, "x": x.grad})
        assert gradients_of_both[-1].keys() == {
            name for name in gradients_of_both[0] if not any(part in name for part in frozen)
        }
        assert all(
            torch.equal(gradient, gradients_of_both[0][name]) for name, gradient in gradients_of_both[-1].items()
        )
    assert len(calls) == 4


@DORA
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("level", [0.4, LEVELS], ids=["one", "per sample"])
def test_layer_without_gradients_computes_the_same(
    calls: list[bool], use_dora: bool, dtype: torch.dtype, level: Any
) -> None:
    model, x = one_layer(use_dora).to(dtype), torch.randn(3, 4, 7, dtype=dtype)
    with noise_level(model, level):
        expected = model(x).detach()
        with torch.no_grad():
            again = [model(x), model(x)]
        with torch.inference_mode():
            again.append(model(x).clone())
    assert len(calls) == 4
    for output in again:
        assert output.dtype == dtype
        tolerance = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
        assert relative_error(output, expected) < tolerance


def test_operand_without_gradients_is_the_transposed_core() -> None:
    model = one_layer(False)
    channel, key = find_holders(model)[0].channel, ("default", "shared")
    C = exact_core(model, torch.tensor([0.4])).float()
    D = C - torch.eye(4)
    with channel.using({key: D}, None):
        assert channel.operand(key, D, torch.empty(1)).shape == D.shape
        with torch.no_grad():
            torch.testing.assert_close(channel.operand(key, D, torch.empty(1)), C[0].T)
            assert channel.operand(key, D, torch.empty(1, dtype=torch.bfloat16)).shape == D.shape
            assert channel.operand(key, D[:, :2, :2], torch.empty(1)).shape == (2, 2)
        assert channel.operand(key, D, torch.empty(1)).shape == D.shape


@DORA
def test_fused_layer_has_the_parts_second_derivatives(
    monkeypatch: pytest.MonkeyPatch, calls: list[bool], use_dora: bool
) -> None:
    model, x, derivatives = one_layer(use_dora), torch.randn(3, 4, 7), []
    parameters = [p for p in model.parameters() if p.requires_grad]
    for in_one in (True, False):
        if not in_one:
            for room in (variants, dora):
                monkeypatch.setattr(room, "fits_one_function", lambda *_: False)
        leaf = x.clone().requires_grad_()
        with noise_level(model, LEVELS):
            slopes = torch.autograd.grad(model(leaf).pow(3).sum(), [leaf, *parameters], create_graph=True)
        total = sum(slope.square().sum() for slope in slopes)
        derivatives.append(torch.autograd.grad(total, [leaf, *parameters]))
    assert len(calls) == 1
    for one, other in zip(*derivatives, strict=True):
        assert relative_error(one, other) < 1e-4


def test_fused_float64_layer_has_the_formulas_magnitude_gradient(
    calls: list[bool],
) -> None:
    model, x = one_layer(True).double(), torch.randn(3, 4, 7, dtype=torch.float64)
    layer, C = model.base_model.model.layer, exact_core(model, torch.tensor([0.4]))[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    W = layer.base_layer.weight + 6 / 4 * B @ C @ A
    slope = torch.randn(3, 4, 5, dtype=torch.float64)
    with noise_level(model, 0.4):
        model(x).backward(slope)
    assert len(calls) == 1
    expected = (slope * (x @ W.T)).sum((0, 1)) / W.norm(dim=1)
    assert relative_error(layer.lora_magnitude_vector["default"].weight.grad, expected) < 1e-13


@DORA
def test_fused_layer_has_the_same_batched_gradients(calls: list[bool], use_dora: bool) -> None:
    model, x = one_layer(use_dora), torch.randn(3, 4, 7, requires_grad=True)
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    with noise_level(model, LEVELS):
        output = model(x)
    slopes = torch.randn(6, *output.shape)
    batched = torch.autograd.grad(output, leaves, slopes, is_grads_batched=True, retain_graph=True)
    singles = [torch.autograd.grad(output, leaves, slope, retain_graph=True) for slope in slopes]
    assert len(calls) == 1
    for together, single in zip(batched, zip(*singles, strict=True), strict=True):
        assert relative_error(together, torch.stack(single)) < 1e-5


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")  # PyTorch's own use of it
def test_forward_mode_gradient_matches_layer_in_parts(calls: list[bool]) -> None:
    model, x, direction = one_layer(True), torch.randn(3, 7), torch.randn(3, 7)
    with noise_level(model, LEVELS), torch.no_grad():
        expected = model(x + direction) - model(x)
        calls.clear()
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(x, direction))).tangent
    assert not calls
    torch.testing.assert_close(tangent, expected)


@DORA
def test_fused_layers_output_may_be_changed_in_place(calls: list[bool], use_dora: bool) -> None:
    model, x, gradients_of_both = one_layer(use_dora), torch.randn(3, 4, 7), []
    for change in (lambda y: y * 2 + 1, lambda y: y.mul_(2).add_(1)):
        model.zero_grad()
        with noise_level(model, LEVELS):
            change(model(x)).square().sum().backward()
        gradients_of_both.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(calls) == 2
    for one, other in zip(*gradients_of_both, strict=True):
        torch.testing.assert_close(one, other)


def _two_active(layer: Any, model: Any) -> None:
    model.add_adapter("other", nara_config(target_modules=["layer"]))
    model.base_model.set_adapter(["default", "other"])


STEPWISE: dict[str, Callable[[Any, Any], Any]] = {
    "a hook on B": lambda layer, _: layer.lora_B["default"].register_forward_pre_hook(lambda *_: None),
    "a bias of B": lambda layer, _: setattr(layer.lora_B["default"], "bias", nn.Parameter(torch.ones(5))),
    "a weight that is remade": lambda layer, _: nn.utils.parametrizations.weight_norm(layer.lora_B["default"]),
    "adapters of another dtype": lambda layer, _: layer.base_layer.bfloat16(),
}
BASE_BY_ITSELF: dict[str, Callable[[Any, Any], Any]] = {
    "a hook on the base layer": lambda layer, _: layer.base_layer.register_forward_hook(lambda *_: None),
    "a trained base": lambda layer, _: layer.base_layer.weight.requires_grad_(),
    "a trained bias": lambda layer, _: layer.base_layer.bias.requires_grad_(),
    "two active adapters": _two_active,
    "a forward of one's own": lambda layer, _: setattr(layer.base_layer, "forward", layer.base_layer.forward),
    "dropout": lambda layer, _: layer.lora_dropout.update({"default": nn.Dropout(0.5)}),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@DORA
@pytest.mark.parametrize("name", STEPWISE)
def test_watched_layer_is_computed_step_by_step(name: str, calls: Any, use_dora: bool):
    model = one_layer(use_dora)
    layer = model.base_model.model.layer
    STEPWISE[name](layer, model)
    x = torch.randn(3, 4, 7, dtype=layer.base_layer.weight.dtype)
    with noise_level(model, LEVELS):
        output = model.eval()(x)
    assert not calls
    assert output.dtype == x.dtype


@DORA
@pytest.mark.parametrize("name", BASE_BY_ITSELF)
def test_watched_trained_or_shared_base_has_own_gradients(name: str, calls: Any, use_dora: bool):
    """Output and gradients are those of the steps. NaRA-DoRA, whose norm scales the base, is computed by steps."""
    model, x, tensors = one_layer(use_dora).train(), torch.randn(3, 4, 7), []
    BASE_BY_ITSELF[name](model.base_model.model.layer, model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for is_watched in (False, True):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(0)
        watch = nn.modules.module.register_module_forward_hook(lambda *_: None) if is_watched else nullcontext()
        with watch, noise_level(model, LEVELS):
            output = model(leaf)
        tensors.append([output, *torch.autograd.grad(output.pow(2).sum(), [leaf, *parameters], allow_unused=True)])
    assert set(calls) == (set() if use_dora and name != "two active adapters" else {False})  # the other is a NaRA
    for one, other in zip(*tensors, strict=True):
        assert (one is None) == (other is None)
        assert one is None or relative_error(one, other) < 1e-5


def test_global_hook_sees_the_base_layers_output(calls: list[bool]) -> None:
    model, x, seen = one_layer(False), torch.randn(3, 4, 7), []
    base_layer = model.base_model.model.layer.base_layer
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, _, output: seen.append(output) if module is base_layer else None
    )
    with hook, noise_level(model, LEVELS), torch.no_grad():
        model(x)
        torch.testing.assert_close(seen[0], nn.functional.linear(x, base_layer.weight, base_layer.bias))
    assert not calls


@DORA
def test_layer_under_torch_func_is_computed_in_steps(calls: list[bool], use_dora: bool) -> None:
    model, x = one_layer(use_dora), torch.randn(3, 7)
    with noise_level(model, 0.5):
        torch.func.vmap(model.requires_grad_(False))(x)
        assert not calls
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
        model(x)
    assert calls == [True, True]
