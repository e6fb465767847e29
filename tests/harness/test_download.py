"""One file from the web that several processes want at once."""

from __future__ import annotations

import io
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nara_diffusion.harness.download import download
from tests.helpers.patience import LAST_RESORT, all_at_once

CONTENT = b"[1, 2, 3]"
URL = "https://example.invalid/test.json"


def answered_by(monkeypatch: pytest.MonkeyPatch, answer: Callable[[], Any]) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: answer())


class Slow(io.BytesIO):
    """An answer whose first part comes when all who asked have opened the file that they write."""

    def __init__(self, barrier: threading.Barrier) -> None:
        super().__init__(CONTENT)
        self.barrier = barrier

    def read(self, size: int | None = -1) -> bytes:
        if not self.tell():
            self.barrier.wait()
        return super().read(size)


def test_several_may_fetch_a_file_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, barrier = tmp_path / "cache" / "test.json", threading.Barrier(4, timeout=LAST_RESORT)
    answered_by(monkeypatch, lambda: Slow(barrier))
    all_at_once(lambda _: download(URL, path), range(4), barrier)
    assert path.read_bytes() == CONTENT
    assert [file.name for file in path.parent.iterdir()] == ["test.json"]


def test_a_file_that_another_has_put_there_meanwhile_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "test.json"

    def refused() -> None:
        path.write_bytes(CONTENT)
        raise urllib.error.URLError("too many requests")

    answered_by(monkeypatch, refused)
    download(URL, path)
    assert path.read_bytes() == CONTENT


class Broken(io.BytesIO):
    def read(self, size: int | None = -1) -> bytes:
        if self.tell():
            raise ConnectionResetError("reset by peer")
        return super().read(4)


def test_what_breaks_off_leaves_nothing_and_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answered_by(monkeypatch, lambda: Broken(CONTENT))
    message = rf"{URL} can't be fetched \(reset by peer\): fetch it by other means, and put it at {tmp_path}"
    with pytest.raises(ValueError, match=message):
        download(URL, tmp_path / "test.json")
    assert list(tmp_path.iterdir()) == []
