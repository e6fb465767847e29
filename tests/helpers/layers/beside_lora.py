"""NaRA at C = I beside PEFT's own LoRA of the same weights, each on a base of its own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from nara_diffusion import noise_level
from nara_diffusion.noise.level import find_holders
from tests.helpers.adapted import disturb, lora_config, nara_config

TARGETS = ["first", "second"]
LEVELS = torch.tensor([0.05, 0.5, 0.93])


def beside_lora(make: Callable[[], nn.Module], trained: tuple[str, ...] = (), **options: Any) -> tuple[Any, Any]:
    """PEFT's LoRA and NaRA, as adapter "outer" on what `make` makes; trainable: its factors and what `trained` names.

    NaRA's core has a zero last layer, so that C(λ) = I.
    """
    models = []
    for config in (lora_config, nara_config):
        torch.manual_seed(3)
        models.append(get_peft_model(make(), config(target_modules=TARGETS, **options), adapter_name="outer"))
    theirs, ours = models
    disturb(theirs)
    weights = dict(theirs.named_parameters())
    assert weights.keys() == {name for name, _ in ours.named_parameters() if "nara_core" not in name}
    for model in models:
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.data.copy_(weights[name].data)
                parameter.requires_grad_(any(part in name for part in ("lora_", *trained)))
    return theirs, ours


def told(model: nn.Module) -> AbstractContextManager[None]:
    """λ for the three samples of a batch, if `model` is NaRA's."""
    return noise_level(model, LEVELS) if find_holders(model) else nullcontext()


def outcome(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output of `model`, and the gradients of `x` and of all that is trainable outside the core, by name."""
    x = x.clone().requires_grad_()
    with told(model):
        output = model(x)
    (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
    found: dict[str, Any] = {"output": output.detach(), "x": x.grad}
    found |= {name: p.grad for name, p in model.named_parameters() if p.requires_grad and "nara_core" not in name}
    assert all(tensor is not None for tensor in found.values()), found
    return found


def assert_alike(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert tensor.count_nonzero() > 0, name
        torch.testing.assert_close(ours[name], tensor, rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
