"""Tiny denoisers with a NaRA adapter: what they predict, and the λ that their core is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import inject_adapter_in_model
from torch import Tensor, nn

from tests.helpers.adapted import disturb, nara_config
from tests.helpers.denoisers.models import denoiser, tensor_of, timestep_for

WARNINGS_OF_DIFFUSERS = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),  # PEFT, at a second adapter
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),  # Diffusers' Chroma
    pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype:UserWarning"),  # Diffusers' Mochi
    pytest.mark.filterwarnings("ignore:`Transformer2DModelOutput` is deprecated:FutureWarning"),  # its Stable Audio
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
    pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning"),  # its AnyFlow
    pytest.mark.filterwarnings(
        "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
    ),  # its Wan Animate 2
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning"),  # its Nucleus MoE
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # Diffusers' Karras sigmas
]
"""The `pytestmark` of files that run these models."""

TARGETS = ["to_q", "to_v", "to_out.0"]
OTHER_TARGETS = {
    "JoyImageEditPlusTransformer3DModel": ["img_attn_qkv", "img_attn_proj"],
    "JoyImageEditTransformer3DModel": ["img_attn_qkv", "img_attn_proj"],
    "Kandinsky5Transformer3DModel": ["to_query", "to_value"],
    "Kandinsky6SRTransformer3DModel": ["to_query", "to_value"],
    "Kandinsky6Transformer3DModel": ["to_query", "to_value"],
    "SanaWMTransformer3DModel": ["qkv", "q_linear"],
    "UNetSpatioTemporalConditionModel": ["to_v", "conv1", "conv2"],
}
"""Of classes whose attention has other names, or too little influence on what they predict."""
UNET = "UNet2DConditionModel"


def adapted_denoiser(name: str, config: Any = None, **changes: Any) -> nn.Module:
    """A tiny denoiser with a NaRA adapter on its attention projections, far from C = I."""
    model = denoiser(name, **changes)
    targets = OTHER_TARGETS.get(name, TARGETS)
    inject_adapter_in_model(nara_config(target_modules=targets) if config is None else config, model)
    disturb(model)
    return model


def run(model: nn.Module, inputs: dict[str, Any], timestep: Any, argument: str = "timestep") -> Tensor:
    with torch.no_grad():
        return tensor_of(model(**inputs, **{argument: timestep_for(model, timestep)}))


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
