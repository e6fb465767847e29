"""A place of its own, for each test, to which Diffusers copies the file of a custom pipeline."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import diffusers.utils.dynamic_modules_utils as dynamic_modules
import pytest


@pytest.fixture(autouse=True)
def _own_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dynamic_modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "diffusers_modules"]:
        del sys.modules[name]
