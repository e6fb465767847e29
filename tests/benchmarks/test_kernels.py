"""NaRA launches no more kernels than PEFT's LoRA, and NaRA-DoRA fewer than PEFT's DoRA; neither reads the device."""

from __future__ import annotations

import pytest
from device_reads import reads_of_generation, reads_of_loss, reads_of_unet
from kernel_counts import kernels_of_hypernetwork, kernels_of_layer

MOST = {"NaRA": (5, 11, 5), "NaRA-DoRA": (20, 19, 20)}


@pytest.mark.parametrize("method", MOST)
def test_layer_kernels_are_at_most_the_aims(method: str) -> None:
    kernels = kernels_of_layer(method)
    for kind, most in zip(("forward", "backward", "inference"), MOST[method], strict=True):
        assert sum(kernels[kind].values()) <= most, (kind, kernels[kind])


def test_hypernetwork_launches_ten_kernels_under_autocast() -> None:
    kernels = kernels_of_hypernetwork()
    assert kernels.total() <= 10, kernels


@pytest.mark.slow  # (of the library: tests/acceptance/test_noise_waiting.py)
def test_generation_step_reads_one_value() -> None:
    small = {"block_out_channels": (32, 64, 64), "transformer_layers_per_block": 1, "attention_head_dim": 8}
    small["layers_per_block"] = 1
    assert (reads_of_unet("NaRA", **small), reads_of_loss("NaRA"), reads_of_generation("NaRA")) == (0, 0, 1)
