"""What a test may change of its process and has to put back: the tests after it run in the same one."""

from __future__ import annotations

import os
import threading
from concurrent.futures import thread as pools
from typing import Any

import pytest
import torch
import torch.nn.modules.module as modules

PATIENCE = 5.0
"""Seconds that a thread which is about to end has for it."""
NOT_COMPARED = {
    "PYTEST_CURRENT_TEST",
    "PYTORCH_NVML_BASED_CUDA_CHECK",  # DeepSpeed
    "KMP_DUPLICATE_LIB_OK",  # threadpoolctl
    "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR",  # torch's compiler
    "HF_XET_HIGH_PERFORMANCE",  # lm-eval
}
"""Environment variables that pytest sets around each test, or a library when it is first imported."""


def process_state() -> dict[str, Any]:
    """{what: its value now}, of PyTorch's global hooks and modes, the environment and the threads."""
    hooks = {name: dict(value) for name, value in vars(modules).items() if _is_global_hook(name, value)}
    return {
        **hooks,
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "number of threads": torch.get_num_threads(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "environment": {name: value for name, value in os.environ.items() if name not in NOT_COMPARED},
        "threads": {thread for thread in threading.enumerate() if not thread.daemon},
    }


def left_behind(before: dict[str, Any], workers_may_stay: bool = False) -> list[str]:
    """A sentence for each thing that differs from `before`; threads get time to end; workers of pools may stay."""
    known = before["threads"] | (set(pools._threads_queues) if workers_may_stay else set())
    for thread in process_state()["threads"] - known:
        thread.join(PATIENCE)
    after = process_state()
    left = after["threads"] - known
    after["threads"] = before["threads"] | left  # a thread that ends is no leak
    return [_difference(name, value, after[name]) for name, value in before.items() if value != after[name]]


def fail_if_left(before: dict[str, Any], workers_may_stay: bool = False) -> None:
    if left := left_behind(before, workers_may_stay):
        pytest.fail("the process isn't as it was before the test:\n" + "\n".join(left), pytrace=False)


def _is_global_hook(name: str, value: Any) -> bool:
    return name.startswith("_global_") and isinstance(value, dict)


def _difference(name: str, before: Any, after: Any) -> str:
    if isinstance(before, dict):
        changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
        return f"{name}: " + ", ".join(f"{key!r} was {before.get(key)!r}, is {after.get(key)!r}" for key in changed)
    return f"{name}: was {before!r}, is {after!r}"
