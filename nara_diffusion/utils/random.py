"""Stratified random numbers, a function only of the samples' indices in the training stream.

A sample gets the same number in any process, at any batch size, in any order, and in a resumed run.
In every group of n = `group_size` consecutive indices, each index takes one of the n equal strata
of [0, 1),

    u_i = ((i + shift) mod n + v_i) / n,   shift ~ U{0 … n − 1} a group,  v_i ~ U(0, 1) a sample

so that each u_i is still uniform, while the mean over the group varies far less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

Generators = Callable[[int], np.random.Generator]


def stratified_uniform(
    indices: Sequence[int], group_size: int, shift: Generators, value: Generators
) -> torch.Tensor:
    """Return u (b,), float64 in [0, 1), for each index; independent draws if the group is 1.

    Args:
        indices: indices of the samples in the training stream.
        group_size: n, the samples of a global batch, 1 or more.
        shift, value: the generators of a group's shift and of a sample's v, by number.
    """
    n = group_size
    shifts = {group: int(shift(group).integers(n)) for group in {i // n for i in indices}}
    return torch.tensor(
        [((i + shifts[i // n]) % n + value(i).random()) / n for i in indices], dtype=torch.float64
    )
