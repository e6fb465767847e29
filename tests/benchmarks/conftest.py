"""What the tests of benchmarks share."""

from __future__ import annotations

from collections.abc import Iterator

import benchmark_record
import pytest


@pytest.fixture
def committed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Confirming runs, whether or not this checkout has changes or a branch main."""
    monkeypatch.setattr(benchmark_record, "commit", lambda: "c" * 40)
    monkeypatch.setattr(benchmark_record, "main_commit", lambda: "a" * 40)
    benchmark_record.provenance.cache_clear()
    yield
    benchmark_record.provenance.cache_clear()
