"""Contexts of generators and coroutines whose scope is unclear: a forward raises; and `noise_level` as a decorator."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from typing import Any

import pytest
from peft import PeftModel
from torch import Tensor, nn

from nara_diffusion import noise_level
from tests.helpers.adapted import relative_error
from tests.helpers.two_layers import expect, run


@contextmanager
def managed(model: nn.Module, level: float) -> Iterator[None]:
    with noise_level(model, level):
        yield


def test_a_context_that_a_generator_has_left_open_is_nobodys(model: PeftModel, x: Tensor) -> None:
    """Its λ is meant for somebody, and for whom can't be told: not silently that of a context around it."""

    def enters(stack: ExitStack) -> Iterator[int]:
        stack.enter_context(noise_level(model, 0.9))
        yield 1

    def fails(stack: ExitStack) -> Iterator[int]:
        stack.enter_context(noise_level(model, 0.9))
        yield 1
        raise KeyError

    for generator in (enters, fails):
        with noise_level(model, 0.1):
            with ExitStack() as stack:
                numbers = generator(stack)
                assert next(numbers) == 1
                assert relative_error(run(model, x), expect(model, x, 0.1)) < 2e-6
                with pytest.raises((StopIteration, KeyError)):
                    next(numbers)
                with pytest.raises(
                    ValueError, match=rf"λ is not known: '{generator.__name__}', a generator.*has ended"
                ):
                    model(x)
            assert relative_error(run(model, x), expect(model, x, 0.1)) < 2e-6


def test_a_thread_that_a_generator_hands_its_variables_to_has_no_level(model: PeftModel, x: Tensor) -> None:
    def outputs() -> Iterator[Any]:
        with noise_level(model, 0.9), ThreadPoolExecutor(1) as pool:
            yield pool.submit(contextvars.copy_context().run, run, model, x).exception()

    with noise_level(model, 0.1):
        error = next(outputs())
    assert isinstance(error, ValueError)
    assert "runs in another thread" in str(error)


def test_coroutines_that_are_driven_by_hand_do_not_lend_their_level(model: PeftModel, x: Tensor) -> None:
    class Pause:
        def __await__(self) -> Iterator[None]:
            yield

    async def work(level: float) -> Tensor:
        with managed(model, level):
            await Pause()
            return run(model, x)

    first, second = work(0.1), work(0.9)
    first.send(None)
    second.send(None)
    with pytest.raises(ValueError, match="λ is not known"):
        model(x)
    for coroutine, level in ((first, 0.1), (second, 0.9)):
        with pytest.raises(StopIteration) as done:
            coroutine.send(None)
        assert relative_error(done.value.value, expect(model, x, level)) < 2e-6


def test_a_coroutine_that_enters_for_its_caller_in_an_event_loop(model: PeftModel, x: Tensor) -> None:
    @asynccontextmanager
    async def at_level(level: float) -> AsyncIterator[None]:
        await asyncio.sleep(0)
        with noise_level(model, level):
            yield

    async def enter(stack: AsyncExitStack, level: float) -> None:
        await stack.enter_async_context(at_level(level))

    async def main() -> Tensor:
        async with AsyncExitStack() as stack:
            await enter(stack, 0.3)
            await asyncio.sleep(0)
            return run(model, x)

    assert relative_error(asyncio.run(main()), expect(model, x, 0.3)) < 2e-6


class DrivesAGenerator:
    """A context manager that advances a generator, not by way of `contextlib`."""

    def __init__(self, model: nn.Module, level: float) -> None:
        self.generator = managed.__wrapped__(model, level)  # type: ignore[attr-defined]

    def __enter__(self) -> None:
        next(self.generator)

    def __exit__(self, *error: Any) -> None:
        self.generator.close()


def test_a_generator_that_an_enter_of_ones_own_advances_is_unclear(model: PeftModel, x: Tensor) -> None:
    """It may make a context manager, or be an iterator that is read ahead: neither silently."""
    with noise_level(model, 0.1), DrivesAGenerator(model, 0.9), pytest.raises(ValueError, match="by an `__enter__`"):
        model(x)
    with noise_level(model, 0.1):
        assert relative_error(run(model, x), expect(model, x, 0.1)) < 2e-6


def test_a_task_of_an_asynchronous_generator_that_awaits_is_not_the_callers(model: PeftModel, x: Tensor) -> None:
    async def child() -> Tensor:
        await asyncio.sleep(0)
        return run(model, x)

    async def stream() -> AsyncIterator[Any]:
        with noise_level(model, 0.2):
            yield (await asyncio.gather(child(), return_exceptions=True))[0]
            yield run(model, x)

    async def main() -> None:
        with noise_level(model, 0.9):
            generator = stream()
            error = await anext(generator)
            assert isinstance(error, ValueError), error
            assert "awaits" in str(error)
            assert relative_error(run(model, x), expect(model, x, 0.9)) < 2e-6
            assert relative_error(await anext(generator), expect(model, x, 0.2)) < 2e-6
            await generator.aclose()  # type: ignore[attr-defined]

    asyncio.run(main())


def test_noise_level_as_decorator_holds_for_calls_and_refuses_generators(model: PeftModel, x: Tensor) -> None:
    @noise_level(model, 0.2)
    def call() -> Tensor:
        return run(model, x)

    with noise_level(model, 0.9):
        for _ in range(2):
            assert relative_error(call(), expect(model, x, 0.2)) < 2e-6

    def stream() -> Iterator[Tensor]:
        yield run(model, x)

    async def work() -> Tensor:
        return run(model, x)

    for function in (stream, work):
        with pytest.raises(TypeError, match=f"can't decorate '{function.__name__}'"):
            noise_level(model, 0.2)(function)
