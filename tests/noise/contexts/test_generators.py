"""Generators that enter a context: it holds while they run, for them and what they call, and for nobody else."""

from __future__ import annotations

import contextvars
import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from nara_diffusion import noise_level
from tests.helpers.adapted import relative_error
from tests.helpers.two_layers import expect, run


def outputs_at(model: nn.Module, x: Tensor, level: float) -> Iterator[Tensor]:
    with noise_level(model, level):
        while True:
            yield run(model, x)


def test_a_generator_that_is_left_early_leaves_no_level_behind(model: PeftModel, x: Tensor) -> None:
    for output in outputs_at(model, x, 0.1):
        assert relative_error(output, expect(model, x, 0.1)) < 2e-6
        break
    gc.collect()
    with pytest.raises(ValueError, match="λ is not known"):
        model(x)


def test_a_generator_that_ends_inside_another_context_leaves_that_one_alone(model: PeftModel, x: Tensor) -> None:
    generator = outputs_at(model, x, 0.1)
    next(generator)
    with noise_level(model, 0.9):
        generator.close()
        assert relative_error(run(model, x), expect(model, x, 0.9)) < 2e-6
    with pytest.raises(ValueError, match="λ is not known"):
        model(x)


def test_a_generator_that_another_context_ends(model: PeftModel, x: Tensor) -> None:
    """Its context variables are not those of whoever ends it, so that nothing can be reset, only closed."""
    generator = outputs_at(model, x, 0.1)
    here = contextvars.copy_context()
    here.run(next, generator)
    generator.close()
    with pytest.raises(ValueError, match="λ is not known"):
        here.run(model, x)


def test_generators_that_take_turns_each_have_their_level(model: PeftModel, x: Tensor) -> None:
    levels = (0.1, 0.9, 0.5)
    expected = [expect(model, x, level) for level in levels]
    generators = [outputs_at(model, x, level) for level in levels]
    for _ in range(3):
        for generator, reference in zip(generators, expected, strict=True):
            assert relative_error(next(generator), reference) < 2e-6
    generators[1].close()
    for index in (0, 2):
        assert relative_error(next(generators[index]), expected[index]) < 2e-6


def test_a_suspended_generator_does_not_lend_its_level(model: PeftModel, x: Tensor) -> None:
    generator = outputs_at(model, x, 0.1)
    next(generator)
    with pytest.raises(ValueError, match="λ is not known"):
        model(x)
    with noise_level(model, 0.9):
        next(generator)
        assert relative_error(run(model, x), expect(model, x, 0.9)) < 2e-6
        assert relative_error(next(generator), expect(model, x, 0.1)) < 2e-6
    generator.close()


@pytest.mark.parametrize("enter", [lambda context, stack: context, lambda context, stack: stack.enter_context(context)])
def test_a_context_manager_of_one_s_own_may_hold_the_level(model: PeftModel, x: Tensor, enter: Any) -> None:
    """It is a generator too, but one that yields to the body of its `with`."""

    @contextmanager
    def at_half() -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(noise_level(model, 0.5))
            yield

    with noise_level(model, 0.1), ExitStack() as stack, enter(at_half(), stack) or nullcontext():
        assert relative_error(run(model, x), expect(model, x, 0.5)) < 2e-6


def test_a_generator_that_a_forward_resumes_has_its_own_level_in_parts(model: PeftModel, x: Tensor) -> None:
    root, inner = model.base_model.model, []

    def parts_at(level: float) -> Iterator[None]:
        with noise_level(model, level):
            while True:
                yield
                inner.append(root.second(torch.tanh(root.first(x))))

    generator = parts_at(0.9)
    next(generator)

    def resume(*_: Any) -> None:
        handle.remove()
        next(generator)

    handle = root.second.register_forward_pre_hook(resume)
    with noise_level(model, 0.2):
        outer = run(model, x)
    for actual, level in ((outer, 0.2), (inner[0], 0.9)):
        assert relative_error(actual, expect(model, x, level)) < 2e-6, level
