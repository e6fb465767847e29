"""The fixture around every test sees what a test leaves in its process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from tests.helpers import process_state as state


@contextmanager
def hook() -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, args: None)
    yield
    handle.remove()


@contextmanager
def dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@contextmanager
def grad_mode() -> Iterator[None]:
    with torch.no_grad():
        yield


@contextmanager
def threads_of_torch() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    yield
    torch.set_num_threads(before)


@contextmanager
def environment() -> Iterator[None]:
    os.environ["LEFT_BY_A_TEST"] = "1"
    yield
    del os.environ["LEFT_BY_A_TEST"]


@contextmanager
def thread() -> Iterator[None]:
    end = threading.Event()
    worker = threading.Thread(target=end.wait, name="left-by-a-test")
    worker.start()
    yield
    end.set()
    worker.join()


LEAKS = {
    "_global_forward_pre_hooks": hook,
    "default dtype": dtype,
    "grad mode": grad_mode,
    "number of threads": threads_of_torch,
    "environment: 'LEFT_BY_A_TEST' was None, is '1'": environment,
    "left-by-a-test": thread,
}


@pytest.mark.parametrize(("named", "leak"), LEAKS.items())
def test_left_behind_names_what_changed(named: str, leak: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(state, "PATIENCE", 0.1)
    before = state.process_state()
    with leak():
        (found,) = state.left_behind(before)
        with pytest.raises(pytest.fail.Exception, match=named):
            state.fail_if_left(before)
    assert named in found
    assert state.left_behind(before) == []
