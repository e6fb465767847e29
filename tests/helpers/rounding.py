"""How far apart two correct computations of the same thing may lie: a bound from the dtype and the size alone.

A sum of n products in a dtype of machine epsilon ε is off by about √n · ε, relative to the largest value (Higham and
Mary, 2019: rounding errors are independent, and zero in the mean). The processor chooses the order of a sum, by the
width of its vectors, fused multiply-adds and where in memory a tensor lies, so no two ways agree to less. What
several sums one after the other are off by adds up.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.helpers.adapted import relative_error


def rounding(terms: int, sums: int, dtype: torch.dtype = torch.float32) -> float:
    """The relative error to allow for `sums` sums of `terms` products each, one after the other."""
    return sums * math.sqrt(terms) * torch.finfo(dtype).eps


def rounding_of(model: nn.Module) -> float:
    """For a forward, or the gradients of one, through each weight of `model` once, in its coarsest dtype."""
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    dtype = max((weight.dtype for weight in weights), key=lambda dtype: torch.finfo(dtype).eps)
    return rounding(max(weight[0].numel() for weight in weights), len(weights), dtype)


def assert_near(actual: Tensor, expected: Tensor, model: nn.Module, roundings: float = 1) -> None:
    """Full tensors are equal but for the rounding of one forward of `model`, or of so many."""
    error, bound = relative_error(actual, expected), roundings * rounding_of(model)
    assert error <= bound, f"off by {error:.3g}, {bound:.3g} is rounding"


def assert_far(actual: Tensor, other: Tensor) -> None:
    """Each row differs by far more than rounding."""
    assert actual.shape == other.shape
    for one, another in zip(actual.detach(), other.detach(), strict=True):
        assert (one - another).abs().max() > 1e-2 * another.abs().max()
