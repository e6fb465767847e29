"""The fixture around every test sees what a test leaves in its process."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from tests.helpers import process_state as state


def test_process_state_names_what_a_test_left(monkeypatch):
    monkeypatch.setattr(state, "PATIENCE", 0.1)
    monkeypatch.setenv("LEFT_BY_A_TEST", "0")
    state_before, end = state.process_state(), threading.Event()
    worker = threading.Thread(target=end.wait, name="left-by-a-test")
    worker.start()
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, args: None)
    monkeypatch.setenv("LEFT_BY_A_TEST", "1")
    torch.set_default_dtype(torch.bfloat16)
    try:
        with pytest.raises(pytest.fail.Exception) as failure:
            state.fail_if_left(state_before)
    finally:
        torch.set_default_dtype(torch.float32)
        handle.remove()
        end.set()
        worker.join()
    for name in ("_global_forward_pre_hooks", "default dtype", "LEFT_BY_A_TEST", "left-by-a-test"):
        assert name in str(failure.value)
