"""Small models that `torch.compile` has seen in whole or in part: threads, failures, checkpoints, adapters switched."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

from nara_diffusion import noise_level
from tests.helpers.adapted import TwoLayers, adapted, disturb, nara_config, relative_error
from tests.helpers.patience import LAST_RESORT, all_at_once
from tests.helpers.rounding import rounding_of
from tests.runtime.graphs.compiled import LEVELS, check_gradients, compiled, gradients, output, two_forwards

pytestmark = pytest.mark.filterwarnings(
    # Dynamo looks at the gradient of each input; it hides its warning only where warnings are no errors
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def small() -> PeftModel:
    return adapted(TwoLayers(), target_modules=["first", "second"])


def test_threads(small: PeftModel, x: Tensor) -> None:
    workers, rounds = 3, 40
    levels = [torch.rand(3) for _ in range(workers)]
    expected = [output(small, small, lambda model: model(x), level) for level in levels]
    fast = torch.compile(small, backend="eager")
    output(fast, small, lambda model: model(x), levels[0])
    barrier = threading.Barrier(workers, timeout=LAST_RESORT)

    def work(index: int) -> int:
        right = 0
        for _ in range(rounds):
            barrier.wait()
            result = output(fast, small, lambda model: model(x), levels[index])
            right += relative_error(result, expected[index]) < rounding_of(small)
        return right

    assert all_at_once(work, range(workers), barrier) == [rounds] * workers


def test_a_compiled_forward_that_failed_leaves_nothing_behind(small: PeftModel, x: Tensor) -> None:
    expected = output(small, small, lambda model: model(x), 0.3)
    fast = torch.compile(small, backend="eager")
    for _ in range(2):
        assert torch.equal(output(fast, small, lambda model: model(x), 0.3), expected)
        with pytest.raises(ValueError, match="2 values, but the batch inside layer"):
            output(fast, small, lambda model: model(x), torch.rand(2))
        with pytest.raises(Exception, match=r"mat1|size|shape"):
            output(fast, small, lambda model: model(x[:, :3]), 0.3)
        with pytest.raises(RuntimeError, match=r"No C\(λ\)"):
            small.base_model.model.first(x)


def test_a_layer_compiled_alone_raises_without_its_root(small: PeftModel, x: Tensor) -> None:
    first = small.base_model.model.first
    first.compile(backend="eager")
    expected = output(small, small, lambda model: model(x), 0.3)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"No C\(λ\)"):
            first(x)
        assert torch.equal(output(small, small, lambda model: model(x), 0.3), expected)


def test_nothing_is_left_of_an_interrupted_forward_for_a_layer_compiled_alone(small: PeftModel, x: Tensor) -> None:
    class Interrupted(BaseException):
        """Like KeyboardInterrupt, after which PyTorch runs no hooks."""

    def interrupt(*_: Any) -> None:
        raise Interrupted

    first = small.base_model.model.first
    first.compile(backend="eager")
    output(small, small, lambda model: model(x), 0.3)
    small.base_model.model.second.register_forward_pre_hook(interrupt)
    with pytest.raises(Interrupted):
        output(small, small, lambda model: model(x), 0.3)
    with pytest.raises(RuntimeError, match=r"No C\(λ\)"):
        first(x)


def test_a_compiled_block_in_a_checkpoint_of_one_s_own_is_refused(x: Tensor) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = TwoLayers()
            self.block.compile(backend="eager")

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, x, use_reentrant=False)

    model = adapted(Checkpointed(), target_modules=["first", "second"]).train()
    with noise_level(model, 0.3):
        loss = model(x).sum()
        with pytest.raises(RuntimeError, match=r"No C\(λ\)"):
            loss.backward()


def test_the_context_may_be_inside_of_what_is_compiled(small: PeftModel, x: Tensor) -> None:
    def step(x: Tensor, level: Tensor) -> Tensor:
        with noise_level(small, level):
            once = small(x)
        with noise_level(small, level.flip(0)):
            return once - small(x)

    levels = [torch.rand(3) for _ in range(3)]
    with torch.no_grad():
        expected = [step(x, level) for level in levels]
        fast = torch.compile(step, backend="eager")
        for level, reference in zip(levels, expected, strict=True):
            assert relative_error(fast(x, level), reference) < rounding_of(small)
    with pytest.raises(ValueError, match="λ is not known"):
        small(x)


def test_adapters_may_be_switched(small: PeftModel, x: Tensor) -> None:
    small.add_adapter("other", nara_config(target_modules=["first"], r=3))
    disturb(small, seed=4)
    fast = torch.compile(small, backend="eager")
    for _ in range(2):
        for names in (["default"], ["other"], ["default", "other"]):
            small.base_model.set_adapter(names)
            expected = output(small, small, lambda model: model(x), LEVELS[0])
            assert relative_error(output(fast, small, lambda model: model(x), LEVELS[0]), expected) < rounding_of(small)
        with small.disable_adapter(), torch.no_grad():
            assert torch.equal(fast(x), small(x))


def test_a_checkpoint_that_cannot_be_compiled_is_right_too(x: Tensor) -> None:
    """The recomputation then runs outside the graph."""
    model = adapted(nn.Sequential(checkpoint_wrapper(TwoLayers())), target_modules=["first", "second"]).train()

    both = two_forwards(model, lambda fast: fast(x))
    expected = gradients(model, model, both(model), 0.5)
    second = model.base_model.model[0]._checkpoint_wrapped_module.second
    second.register_forward_pre_hook(torch.compiler.disable(lambda *_: None))
    fast = compiled(model, "torch.compile(model)", "eager")
    check_gradients(model, gradients(model, model, both(fast), 0.5), expected)
    assert counters["graph_break"]
