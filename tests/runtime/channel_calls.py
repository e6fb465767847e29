"""A forward at one λ, and the error of a layer that no C(λ) has reached."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nara_diffusion import noise_level


def at(model: nn.Module, level: float | Tensor, x: Tensor) -> Tensor:
    with noise_level(model, level), torch.no_grad():
        return model(x)


def expect_no_core(layer: nn.Module, x: Tensor) -> None:
    with pytest.raises(RuntimeError, match=r"No C\(λ\) has reached layer '.*first'"):
        layer(x)
