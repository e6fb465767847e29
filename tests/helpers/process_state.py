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
    hooks = {name: value for name, value in vars(modules).items() if name.startswith("_global_")}
    return {
        **{name: dict(value) for name, value in hooks.items() if isinstance(value, dict)},
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


def fail_if_left(before: dict[str, Any]) -> None:
    """Fails with a line for each thing that isn't as `before`. Threads get time to end; workers of pools may stay."""
    threads = before["threads"] | set(pools._threads_queues)
    for thread in process_state()["threads"] - threads:
        thread.join(PATIENCE)
    state = process_state()
    state["threads"] = before["threads"] | state["threads"] - threads  # a thread that ends is no leak
    changes = [f"{name}: {_change(value, state[name])}" for name, value in before.items() if value != state[name]]
    if changes:
        pytest.fail("the process isn't as it was before the test:\n" + "\n".join(changes), pytrace=False)


def _change(before: Any, after: Any) -> str:
    if isinstance(before, dict):
        return ", ".join(
            f"{key!r}: {_change(before.get(key), after.get(key))}"
            for key in before.keys() | after.keys()
            if before.get(key) != after.get(key)
        )
    return f"was {before!r}, is {after!r}"
