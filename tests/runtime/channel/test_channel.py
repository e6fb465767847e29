"""C(λ) on its way from the root to the layers: while the root's forward runs, and no longer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, inject_adapter_in_model
from torch import Tensor, nn

from nara_diffusion import NaraConfig, noise_level
from tests.helpers.adapted import TwoLayers, adapted, default_core, disturb, nara_config, relative_error
from tests.helpers.two_layers import LEVELS, TARGETS
from tests.runtime.channel_calls import at, expect_no_core


class Interrupted(BaseException):
    """Like KeyboardInterrupt, which `except Exception` does not catch."""


# ---------------------------------------------------------------------- stale


def test_a_layer_called_without_its_root_raises(model: PeftModel, x: Tensor) -> None:
    first = model.base_model.model.first
    expect_no_core(first, x)
    at(model, 0.3, x)
    expect_no_core(first, x)
    with noise_level(model, 0.3):
        pass
    expect_no_core(first, x)


@pytest.mark.parametrize("error", [ArithmeticError, Interrupted])
@pytest.mark.parametrize(
    "where", ["in a layer", "before the root's hooks", "after the root's hooks", "in a forward hook"]
)
def test_a_forward_that_was_cut_short_leaves_nothing_behind(
    model: PeftModel, x: Tensor, where: str, error: type[BaseException]
) -> None:
    root = model.base_model.model
    expected = at(model, 0.3, x)

    def fail(*_: Any) -> None:
        raise error

    if where == "in a layer":
        handle = root.second.register_forward_pre_hook(fail)
    elif where == "in a forward hook":
        handle = root.register_forward_hook(fail, prepend=True)
    else:
        handle = root.register_forward_pre_hook(fail, prepend=where.startswith("before"))
    with pytest.raises(error):
        at(model, 0.7, x)
    handle.remove()
    expect_no_core(root.first, x)
    assert torch.equal(at(model, 0.3, x), expected)
    expect_no_core(root.first, x)


def test_a_nested_forward_at_another_level_gives_the_outer_one_back(model: PeftModel, x: Tensor) -> None:
    root = model.base_model.model
    expected_inner, expected_outer = at(model, 0.8, x), at(model, LEVELS, x)
    inner = []

    def run_inside(*_: Any) -> None:
        handle.remove()
        inner.append(at(model, 0.8, x))

    handle = root.second.register_forward_pre_hook(run_inside)
    assert torch.equal(at(model, LEVELS, x), expected_outer)
    assert torch.equal(inner[0], expected_inner)
    expect_no_core(root.first, x)


@pytest.mark.parametrize("error", [ArithmeticError, Interrupted])
@pytest.mark.parametrize("prepend", [True, False])
def test_nested_forwards_that_fail_never_hand_over_the_c_of_another(
    model: PeftModel, x: Tensor, prepend: bool, error: type[BaseException]
) -> None:
    """Outer at one λ, middle at a second, and an inner one that fails before or after it has made its C."""
    root = model.base_model.model
    expected = [at(model, level, x) for level in (0.2, 0.8)]
    depth = 0
    middle = []

    def fail_when_deepest(*_: Any) -> None:
        if depth == 2:
            raise error

    def go_deeper(*_: Any) -> None:
        nonlocal depth
        depth += 1
        if depth == 1:
            middle.append(at(model, 0.8, x))
        elif depth == 2:
            with pytest.raises(error):
                at(model, 0.5, x)

    root.register_forward_pre_hook(fail_when_deepest, prepend=prepend)
    root.second.register_forward_pre_hook(go_deeper)
    assert torch.equal(at(model, 0.2, x), expected[0])
    assert torch.equal(middle[0], expected[1])
    expect_no_core(root.first, x)


def test_a_forward_without_the_root_s_call_has_the_level_that_is_told(model: PeftModel, x: Tensor) -> None:
    with pytest.raises(RuntimeError, match="No C"):
        model.base_model.model.forward(x)
    with noise_level(model, LEVELS):
        assert torch.equal(model.base_model.model.forward(x), model(x))


def test_switching_adapters_between_forwards(model: PeftModel, x: Tensor) -> None:
    expected = at(model, LEVELS, x)
    model.add_adapter("other", nara_config(target_modules=TARGETS, r=3))
    disturb(model.base_model.model.nara_core.cores["other"], seed=5)
    for layer in (model.base_model.model.first, model.base_model.model.second):
        nn.init.normal_(layer.lora_B["other"].weight)
    model.set_adapter("other")
    other = at(model, LEVELS, x)
    assert relative_error(other, expected) > 0.05
    model.set_adapter("default")
    assert torch.equal(at(model, LEVELS, x), expected)
    model.delete_adapter("other")
    assert torch.equal(at(model, LEVELS, x), expected)
    with model.disable_adapter():
        plain = model(x)
    assert torch.equal(plain, model.unload()(x))


# ---------------------------------------------------------------------- other roots


def test_inject_adapter_works_without_a_wrapper(x: Tensor) -> None:
    model = inject_adapter_in_model(nara_config(target_modules=TARGETS), TwoLayers())
    disturb(model)
    assert isinstance(model, TwoLayers)
    outputs = at(model, LEVELS, x)
    one_by_one = torch.cat([at(model, float(level), x[i : i + 1]) for i, level in enumerate(LEVELS)])
    assert relative_error(outputs, one_by_one) < 1e-6


def test_a_root_that_calls_its_children(x: Tensor) -> None:
    model = adapted(nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 5)), target_modules=["0", "2"])
    first, _, second = list(model.base_model.model)[:3]
    C = default_core(model, LEVELS)
    expected = x.double()
    for layer in (first, torch.tanh, second):
        if layer is torch.tanh:
            expected = torch.tanh(expected)
            continue
        A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
        base = F.linear(expected, layer.base_layer.weight.double(), layer.base_layer.bias.double())
        expected = base + 6 / 4 * torch.einsum("or,brs,si,bi->bo", B, C, A, expected)
    assert relative_error(at(model, LEVELS, x), expected) < 2e-6


def test_constant_and_identity_cores_need_no_level(x: Tensor) -> None:
    for core_type in ("constant", "identity"):
        model = adapted(TwoLayers(), target_modules=TARGETS, core_type=core_type)
        assert torch.equal(model(x), at(model, 0.3, x))
    assert isinstance(model.peft_config["default"], NaraConfig)


def test_a_hook_that_is_called_by_itself_raises(model: PeftModel, x: Tensor) -> None:
    root = model.base_model.model
    (hook,) = root._forward_pre_hooks.values()
    with noise_level(model, 0.3), pytest.raises(RuntimeError, match="forward hooks of an adapted model were called"):
        hook(root, (x,), {})
    expect_no_core(root.first, x)
