"""What the tests of merging compare: a model's own tensors, and its output before it is merged."""

from __future__ import annotations

from typing import Any

import torch

from nara_diffusion import noise_level


def tensors_of_base(model: Any) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items() if "lora_" not in n and "nara_core" not in n}


def unmerged_output(model: Any, x: torch.Tensor, level: float) -> torch.Tensor:
    with noise_level(model, level), torch.no_grad():
        return model(x)
