"""Tiny denoisers with a NaRA adapter: what they predict, and the λ that their core is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import inject_adapter_in_model
from torch import Tensor, nn

from tests.helpers.adapted import disturb, nara_config
from tests.helpers.denoiser_models import denoiser, tensor_of

WARNINGS_OF_DIFFUSERS = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),  # PEFT, at a second adapter
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),  # Diffusers' Chroma
    pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype:UserWarning"),  # Diffusers' Mochi
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # Diffusers' Karras sigmas
]
"""The `pytestmark` of files that run these models."""

TARGETS = ["to_q", "to_v", "to_out.0"]
UNET = "UNet2DConditionModel"


def adapted_denoiser(name: str, config: Any = None, **changes: Any) -> nn.Module:
    """A tiny denoiser with a NaRA adapter on its attention projections, far from C = I."""
    model = denoiser(name, **changes)
    inject_adapter_in_model(nara_config(target_modules=TARGETS) if config is None else config, model)
    disturb(model)
    return model


def run(model: nn.Module, inputs: dict[str, Any], timestep: Any, argument: str = "timestep") -> Tensor:
    with torch.no_grad():
        return tensor_of(model(**inputs, **{argument: timestep}))


def told(model: nn.Module, call: Callable[[], Any]) -> list[float]:
    """λ as the model's core gets it while `call` runs."""
    levels: list[Tensor] = []
    core = model.get_submodule("nara_core.cores.default.shared")
    handle = core.register_forward_pre_hook(lambda _, args: levels.append(args[0]))
    try:
        call()
    finally:
        handle.remove()
    assert len(levels) == 1  # once a forward
    return levels[0].tolist()
