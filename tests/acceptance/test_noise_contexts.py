"""`noise_level(model, value)`: which λ a forward has, inside, after, beside other contexts, threads and tasks."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from contextvars import Context, copy_context
from typing import Any

import pytest
import torch
from torch import Tensor

from nara_diffusion import TimestepNoise, noise_level, set_noise_source

from ._noise_models import LAYERS, Stock, TwoLayers, adapt, assert_near, run

LEVELS = [0.05, 0.5, 0.93]
X = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
UNKNOWN = r"λ is not known"


@pytest.fixture(scope="module")
def stock() -> Stock:
    torch.manual_seed(0)
    return adapt(TwoLayers(), LAYERS)[1].double()


@pytest.fixture
def model(stock: Stock) -> Any:
    return stock.adapted


def assert_at(model: Any, stock: Stock, levels: Any, x: Tensor = X) -> None:
    """A forward of `model` has this λ here and now."""
    assert_near(run(model, x), stock.each(levels, x.double()), model)


def assert_unknown(model: Any) -> None:
    with pytest.raises(ValueError, match=UNKNOWN):
        run(model, X)


# ---------------------------------------------------------------------- values


def test_noise_level_value_reaches_every_layer_and_row(model: Any, stock: Stock) -> None:
    levels = torch.tensor(LEVELS)
    for value in (0.37, 0, 1.0, torch.tensor(0.37), levels, levels.double(), LEVELS):
        with noise_level(model, value):
            assert_at(model, stock, value)
    with noise_level(model, levels):
        levels.fill_(7.0)  # λ is a copy
        assert_at(model, stock, LEVELS, torch.randn(3, 6, 7))


def test_invalid_noise_level_raises_naming_its_origin(model: Any) -> None:
    for value, message in [
        (-0.1, r"-0\.1.*\[0, 1\]"),
        (-(2.0**-7), r"-0\.0078125.*\[0, 1\]"),  # by less than a hundredth
        (1 + 2.0**-7, r"1\.0078125.*\[0, 1\]"),
        (torch.tensor([0.2, 1.5, 0.1]), r"1\.5.*\[0, 1\]"),
        (float("nan"), r"nan.*\[0, 1\]"),
        (torch.full((3, 1, 1), 0.5), r"\(3, 1, 1\)"),
        (torch.tensor([True, False, True]), r"bool"),
        (torch.tensor([0.1 + 1j]), r"complex"),
        ("0.3", r"'0\.3'"),
        (None, r"None"),
    ]:
        with pytest.raises(ValueError, match=message), noise_level(model, value):
            run(model, X)
        assert_unknown(model)
        set_noise_source(model, lambda *_, value=value: value)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=message):
            run(model, X)
        set_noise_source(model, None)
    with pytest.raises(ValueError, match="TwoLayers"), noise_level(TwoLayers(), 0.3):
        pass  # without an adapter


def test_noise_level_of_wrong_length_raises(model: Any, stock: Stock) -> None:
    with noise_level(model, torch.tensor([0.2, 0.8])):
        with pytest.raises(ValueError, match=r"2 values.*batch.*3"):
            run(model, X)
        with pytest.raises(ValueError, match=r"2 values.*batch.*4"):  # a multiple isn't a repetition unless declared
            run(model, torch.randn(4, 7))
        assert_at(model, stock, [0.2, 0.8], X[:2])


# ---------------------------------------------------------------------- missing, stale


def test_forward_after_context_or_failure_has_no_level(model: Any, stock: Stock) -> None:
    with pytest.raises(ValueError, match=r"(?s)noise_level\(model.*set_noise_source\(model"):
        model(X)
    with noise_level(model, 0.3):
        assert_at(model, stock, 0.3)
    assert_unknown(model)
    with noise_level(model, 0.3), pytest.raises(RuntimeError, match="shape"):
        run(model, torch.randn(3, 8))
    assert_unknown(model)
    with pytest.raises((RuntimeError, ValueError), match=r"noise_level\(model"):
        run(model.base_model.model.first, X)


def test_separate_part_has_the_level_of_its_context(model: Any, stock: Stock) -> None:
    inner = model.base_model.model

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = inner.second.register_forward_pre_hook(stop)
    with suppress(KeyboardInterrupt), noise_level(model, 0.2):  # no hook of the forward runs after this
        run(model, X)
    handle.remove()
    with noise_level(model, torch.tensor(LEVELS)):
        part = run(inner.first, X)
    expected = [stock.at(level).first(x[None].double()) for level, x in zip(LEVELS, X, strict=True)]
    assert_near(part, torch.cat(expected), model)


class Entering(TwoLayers):
    """Enters a context inside its own forward."""

    inside: Any = None

    def forward(self, x: Tensor, timestep: Any = None) -> Tensor:
        with self.inside:
            return super().forward(x)


def test_context_inside_a_forward_affects_its_model_only(model: Any) -> None:
    """Of another model, it leaves C as the forward made it, from a source, say; of this one, it gives another λ."""
    torch.manual_seed(0)
    entering, stock = adapt(Entering(), LAYERS)
    base: Any = entering.base_model.model
    set_noise_source(entering, lambda *_: torch.tensor(LEVELS))  # type: ignore[arg-type]
    for inside, levels in ((noise_level(model, 0.9), LEVELS), (noise_level(entering, 0.9), 0.9)):
        base.inside, stock.model.inside = inside, ExitStack()
        assert_at(entering, stock.double(), levels)


# ---------------------------------------------------------------------- nesting


def test_nested_contexts_use_innermost_and_restore_outer(model: Any, stock: Stock) -> None:
    def leave_by(error: type[BaseException]) -> None:
        with noise_level(model, 0.6):  # as deep as another before it
            assert_at(model, stock, 0.6)
            raise error

    other, other_stock = adapt(TwoLayers(), LAYERS)
    other_stock.double()
    with noise_level(model, 0.1), noise_level(other, 0.8):
        with noise_level(model, torch.tensor(LEVELS)):
            with noise_level(model, 0.9):
                assert_at(model, stock, 0.9)
            assert_at(model, stock, LEVELS)
            assert_at(other, other_stock, 0.8)
        assert_at(model, stock, 0.1)
        for error in (KeyError, KeyboardInterrupt):
            with pytest.raises(error):
                leave_by(error)
            assert_at(model, stock, 0.1)
    assert_unknown(model)
    assert_unknown(other)


def test_context_left_out_of_order_raises_and_clears(model: Any, stock: Stock) -> None:
    outer, inner = ExitStack(), ExitStack()
    outer.enter_context(noise_level(model, 0.1))
    inner.enter_context(noise_level(model, 0.9))
    for context in (outer, inner):
        with pytest.raises(RuntimeError, match="innermost"):
            context.close()
        assert_unknown(model)
    with noise_level(model, 0.4):
        assert_at(model, stock, 0.4)
    assert_unknown(model)


def test_context_left_before_inner_one_leaves_no_level(model: Any, stock: Stock) -> None:
    around, outer, inner = (noise_level(model, level) for level in (0.4, 0.1, 0.9))
    for context in (around, outer, inner):
        context.__enter__()
    for ended in (outer, inner, around):
        with pytest.raises(RuntimeError, match="innermost"):
            ended.__exit__()
        assert_unknown(model)


# ---------------------------------------------------------------------- threads and tasks


def test_threads_in_one_model_have_their_own_levels(model: Any, stock: Stock) -> None:
    """By contexts or by a source; both threads are between the first layer and the second when either goes on."""
    barrier = threading.Barrier(2, timeout=60)

    def meet(*_: Any) -> None:
        barrier.wait()

    def in_context(level: float) -> Tensor:
        with noise_level(model, level):
            return run(model, X)

    handle = model.base_model.model.second.register_forward_pre_hook(meet)
    with ThreadPoolExecutor(2) as pool:
        with noise_level(model, 0.6):
            outputs = [*pool.map(in_context, (0.2, 0.8))]
        set_noise_source(model, TimestepNoise("sigma"))
        outputs += pool.map(lambda level: run(model, X, level), (0.3, 0.9))
    set_noise_source(model, None)
    handle.remove()
    for level, output in zip((0.2, 0.8, 0.3, 0.9), outputs, strict=True):
        assert_near(output, stock.each(level, X.double()), model)
    with noise_level(model, 0.3), ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match=UNKNOWN):
        pool.submit(run, model, X).result()  # one that is started inside a context has no λ


def test_interleaved_tasks_have_their_own_levels(model: Any, stock: Stock) -> None:
    """Each task of asyncio runs in a `Context` of its own; both enter one `noise_level`."""
    first, second = Context(), Context()
    shared, inner = noise_level(model, 0.37), noise_level(model, 0.8)
    first.run(shared.__enter__)
    second.run(shared.__enter__)
    first.run(inner.__enter__)
    first.run(assert_at, model, stock, 0.8)
    second.run(assert_at, model, stock, 0.37)
    with pytest.raises(RuntimeError, match="another one is the innermost"):
        first.run(shared.__exit__)
    first.run(assert_unknown, model)
    second.run(assert_at, model, stock, 0.37)
    copied = second.run(copy_context)
    second.run(shared.__exit__)
    for context in (second, copied):  # copies of a context that has been left have no λ
        context.run(assert_unknown, model)
