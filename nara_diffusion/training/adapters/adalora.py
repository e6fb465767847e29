"""AdaLoRA (arXiv 2303.10512) in a training loop: a penalty in each loss, and fewer directions after each step.

    loss + weight · mean ‖P Pᵀ − I‖_F    over all A (P = A) and B (P = Bᵀ) of a model: directions stay orthogonal
    allocate_ranks(model, step)          drops the directions of least importance, by PEFT's schedule

PEFT adds the penalty to losses that the model itself computes from labels, which a diffusion model doesn't. Models
without AdaLoRA have no penalty and no budget.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import AdaLoraModel
from torch import Tensor, nn

_MEANS = ("exp_avg_ipt", "exp_avg_unc")


def adalora_models(model: nn.Module) -> list[AdaLoraModel]:
    """PEFT's AdaLoRA tuners in `model`."""
    return [module for module in model.modules() if isinstance(module, AdaLoraModel)]


def orthogonality(tuners: list[AdaLoraModel]) -> Tensor | float:
    """The penalty, a scalar, summed over `tuners`; 0.0 if there are none."""
    total: Tensor | float = 0.0
    for tuner in tuners:
        name = tuner.trainable_adapter_name
        distances = []
        for key, parameter in tuner.model.named_parameters():
            if f"lora_A.{name}" in key or f"lora_B.{name}" in key:
                rows = parameter if "lora_A" in key else parameter.T  # (r, d)
                identity = torch.eye(len(rows), device=rows.device, dtype=rows.dtype)
                distances.append(torch.linalg.matrix_norm(rows @ rows.T - identity))
        config: Any = tuner.peft_config[name]
        total = total + config.orth_reg_weight * torch.stack(distances).mean()
    return total


def allocate_ranks(tuners: list[AdaLoraModel], step: int, skipped: bool = False) -> None:
    """Update the importance of directions and drop some, between the optimizer's step and the end of its gradients.

    Args:
        step: optimizer steps done, this one included.
        skipped: whether the gradients overflowed and the optimizer left them out; they count as zero then.
    """
    for tuner in tuners:
        for name, parameter in tuner.model.named_parameters():
            if "lora_" in name and (skipped or parameter.grad is None):  # None where it is frozen, for nothing reads it
                parameter.grad = torch.zeros_like(parameter)
        tuner.update_and_allocate(step)


def allocator_state(tuners: list[AdaLoraModel]) -> dict[str, Tensor]:
    """The state of the rank allocation, for a checkpoint: {name: tensor}."""
    state = {}
    for number, tuner in enumerate(tuners):
        for mean in _MEANS:
            values = getattr(tuner.rankallocator, mean)
            state |= {f"allocator.{number}.{mean}.{key}": value for key, value in values.items()}
        config: Any = tuner.peft_config[tuner.trainable_adapter_name]
        pattern = (config.rank_pattern or {}).items()
        state |= {f"allocator.{number}.rank_pattern.{key}": torch.tensor(kept) for key, kept in pattern}
    return state


def load_allocator_state(tuners: list[AdaLoraModel], state: dict[str, Tensor]) -> None:
    """Restore what `allocator_state` returned. Other tensors of `state` are ignored."""
    for number, tuner in enumerate(tuners):
        devices = {key: parameter.device for key, parameter in tuner.model.named_parameters()}
        for mean in _MEANS:
            values = _below(state, f"allocator.{number}.{mean}.")
            setattr(tuner.rankallocator, mean, {key: value.to(devices[key]) for key, value in values.items()})
        # PEFT looks up its keys
        tuner.rankallocator.ipt = {
            key: torch.zeros_like(value) for key, value in tuner.rankallocator.exp_avg_ipt.items()
        }
        pattern = _below(state, f"allocator.{number}.rank_pattern.")
        config: Any = tuner.peft_config[tuner.trainable_adapter_name]
        config.rank_pattern = {key: kept.tolist() for key, kept in pattern.items()} or None


def _below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
