"""The estimate of memory: its parts for LLaDA-8B, and its fit at a width that it wasn't made of."""

from __future__ import annotations

from importlib import import_module

import pytest

pytestmark = pytest.mark.slow


def test_estimate_has_the_weights_of_llada_8b_and_the_activations_of_another_width(tmp_path):
    memory = import_module("benchmark_memory_8b")
    rows = memory.main(rank=8, tokens=64, batch_size=2, output_dir=str(tmp_path))
    linear, others = 32 * (4 + 9) * 4096**2, 2 * 126464 * 4096 + 65 * 4096  # published sizes, 8.02 billion together
    for bits, bytes_ in (("16", 2 * (linear + others)), ("8", linear + 4 * others)):
        assert rows[bits]["weights"] == pytest.approx(bytes_, rel=1e-6)
    assert rows["4"]["weights"] == pytest.approx(0.516 * linear + 4 * others, rel=1e-3)
    alpha, beta, error = memory.activations(8, quantised=True)
    assert error < 0.02
    kept = memory.kept_bytes(memory.small(8, True, width=384, layers=1), 64)
    assert kept == pytest.approx((alpha + beta * 384) * 64, rel=0.1)
    assert (tmp_path / "memory_8b.json").is_file()
