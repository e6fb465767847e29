"""Two layers into which saved adapters load."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nara_diffusion import noise_level
from tests.helpers.adapted import TwoLayers

LEVELS = torch.tensor([0.05, 0.5, 0.93])
TARGETS = ["first", "second"]
WEIGHTS = "adapter_model.safetensors"


def base_model() -> TwoLayers:
    torch.manual_seed(7)
    return TwoLayers()


def reseeded_base() -> TwoLayers:
    """The same base model, after which the generator is somewhere else."""
    base = base_model()
    torch.manual_seed(12345)
    return base


def output(model: nn.Module, x: Tensor) -> Tensor:
    with noise_level(model, LEVELS), torch.no_grad():
        return model(x)
