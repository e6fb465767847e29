"""Ctrl-C as a request."""

import signal
import threading

import pytest

from nara_diffusion.training.interrupt import InterruptRequest


def test_the_first_is_a_request_and_the_second_stops() -> None:
    before = signal.getsignal(signal.SIGINT)
    with InterruptRequest() as request:
        assert not request.made
        signal.raise_signal(signal.SIGINT)
        assert request.made
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_handler_is_restored_after_an_error() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError), InterruptRequest():
        raise RuntimeError
    assert signal.getsignal(signal.SIGINT) is before


def test_outside_the_main_thread_nothing_is_asked() -> None:
    seen = []

    def work() -> None:
        with InterruptRequest() as request:
            seen.append(request.made)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
