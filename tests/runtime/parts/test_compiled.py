"""A part of an adapted model that is compiled by itself: it never reads the C(λ) of a forward that isn't its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from nara_diffusion import noise_level, set_noise_source
from nara_diffusion.noise.ablations import mean_core
from nara_diffusion.noise.signals import NoiseSignals
from tests.helpers.adapted import TwoLayers, adapted, relative_error
from tests.helpers.two_layers import LEVELS, TARGETS, expect


@pytest.fixture(autouse=True)
def _compiled_anew() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def model() -> PeftModel:
    return adapted(TwoLayers(), target_modules=TARGETS).requires_grad_(False)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 7)


def compiled_first(model: PeftModel, *, in_place: bool) -> nn.Module:
    first = model.base_model.model.first
    if in_place:
        first.compile(backend="eager")
        return first
    return torch.compile(first, backend="eager")  # type: ignore[return-value]


def interrupted(model: PeftModel, call: Callable[[], Any], error: type[BaseException]) -> None:
    """A forward at LEVELS, by a source, that ends by `error` once the first layer has run."""

    def interrupt(*_: Any) -> None:
        raise error

    handle = model.base_model.model.second.register_forward_pre_hook(interrupt)
    set_noise_source(model, lambda module, args, kwargs: NoiseSignals(LEVELS))  # type: ignore[arg-type]
    with pytest.raises(error):
        call()
    handle.remove()


def test_a_compiled_part_has_the_level_that_is_told(model: PeftModel, x: Tensor) -> None:
    first = model.base_model.model.first
    compiled = torch.compile(first, backend="eager")
    for level in (0.3, LEVELS, 0.8):
        with noise_level(model, level), torch.no_grad():
            assert relative_error(compiled(x), first(x)) < 2e-6
    with pytest.raises(RuntimeError, match=r"No C\(λ\)"):
        compiled(x)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_a_compiled_part_after_an_interrupted_forward_has_the_level_that_is_told(
    model: PeftModel, x: Tensor, error: type[BaseException]
) -> None:
    compiled = compiled_first(model, in_place=False)
    with noise_level(model, 0.9):
        expected = compiled(x)
    interrupted(model, lambda: model(x), error)
    with noise_level(model, 0.9):
        assert relative_error(compiled(x), expected) < 1e-6


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
@pytest.mark.parametrize("root_is_compiled", [False, True], ids=["eager root", "compiled root"])
def test_a_compiled_part_after_an_interrupted_forward_does_not_read_its_core(
    model: PeftModel, x: Tensor, root_is_compiled: bool, error: type[BaseException]
) -> None:
    compiled = compiled_first(model, in_place=False)
    with noise_level(model, 0.9):
        compiled(x)
    root = torch.compile(model, backend="eager") if root_is_compiled else model
    interrupted(model, lambda: root(x), error)
    with pytest.raises(RuntimeError, match=r"No C\(λ\)"):
        compiled(x)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_part_inside_a_forward_has_the_level_of_its_own_context(
    model: PeftModel, x: Tensor, in_place: bool
) -> None:
    root = model.base_model.model
    compiled = compiled_first(model, in_place=in_place)
    inner: list[Tensor] = []

    def call_a_part(*_: Any) -> None:
        inner.append(compiled(x))
        for level in (0.9, LEVELS):
            with noise_level(model, level):
                inner.append(compiled(x))
        with mean_core(model, [0.7]):
            inner.append(compiled(x))
        inner.append(compiled(x))

    root.second.register_forward_pre_hook(call_a_part)
    with noise_level(model, 0.2):
        outer = model(x)
    assert relative_error(outer, expect(model, x, 0.2)) < 2e-6
    root.second._forward_pre_hooks.clear()
    for actual, level in zip(inner, (0.2, 0.9, LEVELS, 0.7, 0.2), strict=True):
        with noise_level(model, level):
            assert relative_error(actual, root.first.forward(x)) < 2e-6, level


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("compiled_first_of_all", [True, False])
def test_a_root_compiled_in_place_before_or_after_its_adapter_came_ends_what_layers_read(
    x: Tensor, error: type[BaseException], compiled_first_of_all: bool
) -> None:
    torch.compiler.reset()
    root = TwoLayers()
    if compiled_first_of_all:
        root.compile(backend="eager")
    original = root._compiled_call_impl
    model = adapted(root, target_modules=TARGETS).requires_grad_(False)
    if not compiled_first_of_all:
        root.compile(backend="eager")
    with noise_level(model, LEVELS):
        assert relative_error(model(x), expect(model, x, LEVELS)) < 2e-6
    part = torch.compile(root.first, backend="eager")
    torch.compiler.reset()  # a graph does not look for hooks that came later
    interrupted(model, lambda root=root: root(x), error)
    with pytest.raises(RuntimeError, match=r"No C\(λ\)"):
        part(x)
    set_noise_source(model, None)
    model.base_model.unload()
    assert "_call_impl" not in root.__dict__
    if compiled_first_of_all:
        assert root._compiled_call_impl is original
    root(x)
