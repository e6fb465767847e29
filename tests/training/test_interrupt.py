"""Ctrl-C and SIGTERM: requests during training, an interruption before and after."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from nara_diffusion.training.interrupt import InterruptRequest, Terminated, sigterm_interrupts

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.mark.parametrize("first", SIGNALS)
def test_the_first_is_a_request_and_a_second_ctrl_c_stops(first: int) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    now = 100.0
    with InterruptRequest(clock=lambda: now) as request:
        assert request.signal == 0
        signal.raise_signal(first)
        assert request.signal == first
        now += 3
        signal.raise_signal(signal.SIGTERM)
        assert request.signal == first
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_second_ctrl_c_within_two_seconds_is_the_launchers() -> None:
    now = 100.0
    with InterruptRequest(clock=lambda: now) as request:
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
            now += 0.9
        assert request.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_sigterm_where_nothing_can_be_saved_interrupts() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), sigterm_interrupts():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_worker_outlives_what_its_group_is_sent(tmp_path) -> None:
    """SIGINT, and SIGTERM once: a second one is the main process's own."""
    worker = f"""
import os, signal
from nara_diffusion.training.interrupt import leave_signals_to_main_process
leave_signals_to_main_process(0)
for number in (signal.SIGINT, signal.SIGTERM):
    os.kill(os.getpid(), number)
open({str(tmp_path / "alive")!r}, "w").close()
os.kill(os.getpid(), signal.SIGTERM)
open({str(tmp_path / "still alive")!r}, "w").close()
"""
    done = subprocess.run([sys.executable, "-c", worker], capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["alive"]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel call is Linux's")
def test_a_launcher_that_is_killed_takes_its_process_along_by_sigterm(tmp_path) -> None:
    """As `accelerate launch` is killed, by a signal that it doesn't hand on."""
    child = f"""
import os, signal, sys
from pathlib import Path
from nara_diffusion.training.interrupt import follow_launcher

def note(number, frame):
    Path({str(tmp_path / "note")!r}).write_text(signal.Signals(number).name)
    os._exit(0)

signal.signal(signal.SIGTERM, note)
follow_launcher()
print("ready", flush=True)
signal.pause()
"""
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    environment = {**os.environ, "ACCELERATE_MIXED_PRECISION": "no"}
    with subprocess.Popen([sys.executable, "-c", launcher], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout.readline() == b"ready\n"
        process.kill()
        assert process.stdout.read() == b""  # ends when the child does, which has it too
    assert (tmp_path / "note").read_text() == "SIGTERM"


def test_the_handler_is_restored_after_an_error() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(RuntimeError), InterruptRequest():
        raise RuntimeError
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_outside_the_main_thread_nothing_is_asked() -> None:
    seen = []

    def work() -> None:
        with InterruptRequest() as request:
            seen.append(request.signal)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [0]
