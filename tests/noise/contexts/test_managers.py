"""However a generator has entered a context, by whatever manager: it holds for the generator and for nobody else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from nara_diffusion import noise_level
from nara_diffusion.noise.ablations import changed_noise, constant_noise, mean_core
from tests.helpers.adapted import disturb, nara_config, relative_error
from tests.helpers.two_layers import LEVELS, TARGETS, expect, run


class AtLevel:
    """A context manager of one's own, by `__enter__`."""

    def __init__(self, model: nn.Module, level: float) -> None:
        self.inner = noise_level(model, level)

    def __enter__(self) -> None:
        self.inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.inner.__exit__(*error)


@contextmanager
def managed(model: nn.Module, level: float) -> Iterator[None]:
    with noise_level(model, level):
        yield


@contextmanager
def managed_by_delegation(model: nn.Module, level: float) -> Iterator[None]:
    def inner() -> Iterator[None]:
        with noise_level(model, level):
            yield

    yield from inner()


@contextmanager
def managed_twice(model: nn.Module, level: float) -> Iterator[None]:
    with managed(model, level):
        yield


@contextmanager
def in_a_stack(model: nn.Module, level: float) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(managed(model, level))
        yield


MANAGERS: list[Callable[[nn.Module, float], Any]] = [
    noise_level, AtLevel, managed, managed_by_delegation, managed_twice, in_a_stack
]  # fmt: skip


@pytest.mark.parametrize("manager", MANAGERS)
def test_noise_level_entered_by_a_suspended_generator_holds_for_nobody_else(
    model: PeftModel, x: Tensor, manager: Any
) -> None:
    def outputs(level: float) -> Iterator[Tensor]:
        with manager(model, level):
            while True:
                yield run(model, x)

    generators = {level: outputs(level) for level in (0.1, 0.9, 0.5)}
    expected = {level: expect(model, x, level) for level in (*generators, 0.7)}
    for _ in range(2):
        for level, generator in generators.items():
            assert relative_error(next(generator), expected[level]) < 2e-6
            with pytest.raises(ValueError, match="λ is not known"):
                model(x)
            with manager(model, 0.7):
                assert relative_error(run(model, x), expected[0.7]) < 2e-6
                assert relative_error(next(generator), expected[level]) < 2e-6
                assert relative_error(run(model, x), expected[0.7]) < 2e-6
    generators[0.9].close()
    for level in (0.1, 0.5):
        assert relative_error(next(generators[level]), expected[level]) < 2e-6


@pytest.mark.parametrize("manager", MANAGERS)
def test_a_context_manager_holds_for_the_body_of_its_with(model: PeftModel, x: Tensor, manager: Any) -> None:
    with noise_level(model, 0.1), manager(model, 0.9):
        assert relative_error(run(model, x), expect(model, x, 0.9)) < 2e-6
    with pytest.raises(ValueError, match="λ is not known"):
        model(x)


def test_a_function_that_a_generator_calls_enters_for_the_generator(model: PeftModel, x: Tensor) -> None:
    def enter(stack: ExitStack, level: float) -> None:
        stack.enter_context(noise_level(model, level))

    def outputs(level: float) -> Iterator[Tensor]:
        with ExitStack() as stack:
            enter(stack, level)
            while True:
                yield run(model, x)

    first, second = outputs(0.1), outputs(0.9)
    for _ in range(2):
        assert relative_error(next(first), expect(model, x, 0.1)) < 2e-6
        assert relative_error(next(second), expect(model, x, 0.9)) < 2e-6
        with pytest.raises(ValueError, match="λ is not known"):
            model(x)


def test_generators_under_ablations_that_end_out_of_order_leave_nothing_behind(model: PeftModel, x: Tensor) -> None:
    def outputs(level: float) -> Iterator[Tensor]:
        with changed_noise(model, constant_noise(level)), noise_level(model, LEVELS):
            while True:
                yield run(model, x)

    first, second = outputs(0.1), outputs(0.9)
    for generator, level in ((first, 0.1), (second, 0.9), (first, 0.1)):
        assert relative_error(next(generator), expect(model, x, level)) < 2e-6
        with noise_level(model, LEVELS):
            assert relative_error(run(model, x), expect(model, x, LEVELS)) < 2e-6
    first.close()
    second.close()
    with noise_level(model, LEVELS):
        assert relative_error(run(model, x), expect(model, x, LEVELS)) < 2e-6
    with mean_core(model, [0.4]):
        mean = run(model, x)
    assert relative_error(mean, expect(model, x, 0.4)) < 2e-6


def test_generators_with_mixed_batches_that_take_turns(model: PeftModel, x: Tensor) -> None:
    model.add_adapter("other", nara_config(target_modules=TARGETS))
    disturb(model, seed=3)

    def outputs(names: list[str]) -> Iterator[Tensor]:
        with noise_level(model, LEVELS), model.base_model._enable_peft_forward_hooks(adapter_names=names):
            while True:
                yield run(model.base_model.model, x)

    lists = [["default", "other", "other"], ["other", "default", "default"]]
    with noise_level(model, LEVELS):
        expected = [model(x, adapter_names=names) for names in lists]
    generator = outputs(lists[0])
    torch.testing.assert_close(next(generator), expected[0])
    with noise_level(model, LEVELS):
        torch.testing.assert_close(model(x, adapter_names=lists[1]), expected[1])
    generator.close()
    with noise_level(model, LEVELS):
        assert relative_error(run(model, x), expect(model, x, LEVELS)) < 2e-6
