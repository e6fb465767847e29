"""C(λ) stays in the thread that runs the root's forward, replicas of DataParallel included."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from nara_diffusion import noise_level
from tests.helpers.patience import LAST_RESORT, all_at_once
from tests.helpers.two_layers import LEVELS
from tests.runtime.channel_calls import at, expect_no_core


def test_threads_at_different_levels_on_one_model(model: PeftModel, x: Tensor) -> None:
    workers, rounds = 4, 60
    levels = [torch.rand(3) for _ in range(workers)]
    expected = [at(model, level, x) for level in levels]
    barrier = threading.Barrier(workers, timeout=LAST_RESORT)

    def work(index: int) -> int:
        right = 0
        for _ in range(rounds):
            barrier.wait()
            right += torch.equal(at(model, levels[index], x), expected[index])
        return right

    assert all_at_once(work, range(workers), barrier) == [rounds] * workers


def test_threads_that_meet_inside_the_forward(model: PeftModel, x: Tensor) -> None:
    """Both threads are between the root and the second layer at the same time."""
    levels = [torch.rand(3), torch.rand(3)]
    expected = [at(model, level, x) for level in levels]
    barrier = threading.Barrier(2, timeout=LAST_RESORT)
    model.base_model.model.second.register_forward_pre_hook(_waits(barrier))
    outputs = all_at_once(lambda level: at(model, level, x), levels, barrier)
    assert all(map(torch.equal, outputs, expected))


def test_a_thread_that_runs_a_part_of_the_model_raises(model: PeftModel, x: Tensor) -> None:
    """As a model that sends its blocks to threads would."""

    def in_a_thread(*_: Any) -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(expect_no_core, model.base_model.model.first, x).result()

    model.base_model.model.second.register_forward_pre_hook(in_a_thread)
    at(model, 0.3, x)


def test_replicas_of_data_parallel(model: PeftModel, x: Tensor) -> None:
    """`nn.DataParallel` runs shallow replicas in threads: λ from a context is missing there, and says so."""
    replicas = [_replica(model) for _ in range(2)]
    with noise_level(model, LEVELS), ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(replica, x) for replica in replicas]:
            with pytest.raises(ValueError, match="λ is not known"):
                future.result()
    expected = [at(model, level, x) for level in (0.2, 0.7)]
    barrier = threading.Barrier(2, timeout=LAST_RESORT)
    for replica in replicas:
        replica.base_model.model.second.register_forward_pre_hook(_waits(barrier))
    outputs = all_at_once(lambda call: at(*call, x), list(zip(replicas, (0.2, 0.7), strict=True)), barrier)
    assert all(map(torch.equal, outputs, expected))


def _waits(barrier: threading.Barrier) -> Any:
    """A hook that lets no thread pass before the others are there."""

    def wait(*_: Any) -> None:
        barrier.wait()

    return wait


def _replica(module: nn.Module) -> nn.Module:
    """What `torch.nn.parallel.replicate` makes, without needing a GPU."""
    replica = module._replicate_for_data_parallel()
    replica._parameters = dict(module._parameters)
    replica._forward_pre_hooks = copy.copy(module._forward_pre_hooks)
    for name, child in module.named_children():
        replica._modules[name] = _replica(child)
    return replica
