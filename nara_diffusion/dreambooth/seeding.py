"""Random numbers as a function of (seed, stream, index) and nothing else.

A sample gets the same crop, latent and noise in any process, at any batch size and in any order, and a resumed run
needs no random state. `stream` names what the numbers are for, so that two uses never share theirs; `index` is the
sample's position in the training stream. Normal numbers are drawn on the CPU, so they don't depend on the device.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch


def numpy_generator(seed: int, stream: str, index: int) -> np.random.Generator:
    """NumPy's generator for (seed, stream, index)."""
    return np.random.default_rng((seed, zlib.crc32(stream.encode()), index))


def torch_generator(seed: int, stream: str, index: int) -> torch.Generator:
    """A CPU generator for (seed, stream, index)."""
    state = np.random.SeedSequence((seed, zlib.crc32(stream.encode()), index)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)


def seeded_normal(shape: Sequence[int], *, seed: int, stream: str, indices: Sequence[int]) -> torch.Tensor:
    """Standard normal float32 numbers (b, *shape) on the CPU: row i depends on (seed, stream, indices[i]) alone."""
    return torch.stack([torch.randn(*shape, generator=torch_generator(seed, stream, int(i))) for i in indices])
