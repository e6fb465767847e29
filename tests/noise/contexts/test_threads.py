"""For whom λ holds: each thread, task and async generator has its own."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from peft import PeftModel
from torch import Tensor

from nara_diffusion import noise_level
from tests.helpers.adapted import relative_error
from tests.helpers.patience import LAST_RESORT, all_at_once
from tests.helpers.two_layers import expect, run


def test_a_thread_started_inside_a_context_has_no_level(model: PeftModel, x: Tensor) -> None:
    with noise_level(model, 0.3), ThreadPoolExecutor(1) as pool:
        with pytest.raises(ValueError, match="λ is not known"):
            pool.submit(model, x).result()
        inherited = pool.submit(contextvars.copy_context().run, run, model, x).result()
    assert relative_error(inherited, expect(model, x, 0.3)) < 2e-6


def test_threads_have_their_own_levels(model: PeftModel, x: Tensor) -> None:
    barrier = threading.Barrier(2, timeout=LAST_RESORT)

    def work(level: float) -> Tensor:
        barrier.wait()
        with noise_level(model, level):
            barrier.wait()
            output = run(model, x)
            barrier.wait()
        return output

    outputs = all_at_once(work, (0.2, 0.8), barrier)
    for level, output in zip((0.2, 0.8), outputs, strict=True):
        assert relative_error(output, expect(model, x, level)) < 2e-6


def test_interleaved_tasks_have_their_own_levels(model: PeftModel, x: Tensor) -> None:
    levels = (0.1, 0.4, 0.9)

    async def work(level: float, outputs: list[Tensor]) -> None:
        for _ in range(3):
            with noise_level(model, level):
                await asyncio.sleep(0)
                outputs.append(run(model, x))
                await asyncio.sleep(0)
                outputs.append(await asyncio.to_thread(run, model, x))
            with pytest.raises(ValueError, match="λ is not known"):
                run(model, x)

    async def interleaved() -> dict[float, list[Tensor]]:
        outputs: dict[float, list[Tensor]] = {level: [] for level in levels}
        await asyncio.gather(*(work(level, outputs[level]) for level in levels))
        return outputs

    for level, outputs in asyncio.run(interleaved()).items():
        assert len(outputs) == 6
        for output in outputs:
            assert relative_error(output, expect(model, x, level)) < 2e-6


def test_a_task_does_not_outlive_the_context_that_started_it(model: PeftModel, x: Tensor) -> None:
    async def late() -> None:
        await asyncio.sleep(0)
        with pytest.raises(ValueError, match="λ is not known"):
            run(model, x)

    async def main() -> None:
        with noise_level(model, 0.3):
            task = asyncio.create_task(late())
        await task

    asyncio.run(main())


def test_async_generators_that_take_turns_in_one_task(model: PeftModel, x: Tensor) -> None:
    async def stream(level: float) -> AsyncIterator[Tensor]:
        with noise_level(model, level):
            while True:
                await asyncio.sleep(0)
                yield run(model, x)
                with pytest.raises(ValueError, match="λ is not known"):
                    await asyncio.to_thread(run, model, x)

    async def main() -> None:
        streams = {level: stream(level) for level in (0.1, 0.9)}
        for _ in range(4):
            for level, generator in streams.items():
                assert relative_error(await anext(generator), expect(model, x, level)) < 2e-6
        with pytest.raises(ValueError, match="λ is not known"):
            run(model, x)
        for generator in streams.values():
            await generator.aclose()  # type: ignore[attr-defined]

    asyncio.run(main())


def test_an_async_generator_that_is_left_early(model: PeftModel, x: Tensor) -> None:
    async def stream() -> AsyncIterator[Tensor]:
        with noise_level(model, 0.3):
            while True:
                yield run(model, x)

    async def main() -> None:
        generator = stream()
        async for output in generator:
            assert relative_error(output, expect(model, x, 0.3)) < 2e-6
            break
        await asyncio.create_task(generator.aclose())  # as the event loop does for a forgotten one: in another task
        with pytest.raises(ValueError, match="λ is not known"):
            run(model, x)

    asyncio.run(main())
