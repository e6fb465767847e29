"""NaRA launches no more kernels than PEFT's LoRA, and NaRA-DoRA fewer than PEFT's DoRA."""

from __future__ import annotations

import pytest
from kernel_counts import kernels_of_hypernetwork, kernels_of_layer

MOST = {"NaRA": (5, 11, 5), "NaRA-DoRA": (20, 19, 20)}


@pytest.mark.parametrize("method", MOST)
def test_kernels_of_a_layer_are_at_most_those_of_the_aims(method: str) -> None:
    found = kernels_of_layer(method)
    for kind, most in zip(("forward", "backward", "inference"), MOST[method], strict=True):
        assert sum(found[kind].values()) <= most, (kind, found[kind])


def test_hypernetwork_launches_ten_kernels_under_autocast() -> None:
    found = kernels_of_hypernetwork()
    assert found.total() <= 10, found
