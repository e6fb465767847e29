"""Adapters on the small pipelines, as training leaves them, and what a test compares pipelines by."""

from __future__ import annotations

from typing import Any

import torch
from peft import inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from tests.helpers.adapted import nara_config
from tests.helpers.small_pipelines import small_sdxl

UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "time_emb_proj"]
TEXT_TARGETS = ["q_proj", "v_proj", "fc1"]
FILE = "pytorch_nara_weights.safetensors"
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "vae")


def shake(model: nn.Module, seed: int, scale: float = 0.2) -> None:
    """Give every trainable tensor of the adapters another value: no zero and no identity is left to hide behind."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "nara_core" in name:
            noise = scale * torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(noise.abs() + 0.5 if "magnitude" in name else noise)


def trained(pipe: Any = None, *, seed: int = 1, name: str = "default", text: bool = True, **changes: Any) -> Any:
    """A pipeline with one NaRA, on its denoiser and, as static adapters, on its text encoders."""
    pipe = small_sdxl() if pipe is None else pipe
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    options = {"target_modules": UNET_TARGETS, "lora_alpha": 3, **changes}
    denoiser.add_adapter(nara_config(**options), name)
    shake(denoiser, seed)
    for index, part in enumerate(("text_encoder", "text_encoder_2")):
        if text and part in pipe.components:
            model = getattr(pipe, part)
            inject_adapter_in_model(
                nara_config(core_type="identity", r=2 + index, lora_alpha=3, target_modules=TEXT_TARGETS), model, name
            )
            shake(model, seed + 10 + index)
    return pipe


def predict(pipe: Any) -> Tensor:
    """What SDXL's UNet says for two samples at different timesteps: all that an adapter of the UNet can change."""
    generator = torch.Generator().manual_seed(9)
    sample, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 40, generator=generator)
    condition = {
        "text_embeds": torch.randn(2, 24, generator=generator),
        "time_ids": torch.tensor([[16.0, 16, 0, 4, 16, 16], [32.0, 20, 0, 0, 16, 16]]),
    }
    with torch.no_grad():
        return pipe.unet(sample, torch.tensor([33, 870]), text, added_cond_kwargs=condition).sample


class State:
    """All that loading an adapter could change in a pipeline: modules, tensors, hooks, attributes, flags."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = set(pipe.__dict__)
        self.parts = {name: _state(part) for name in COMPONENTS if (part := getattr(pipe, name, None)) is not None}

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, State)
        assert self.pipe == other.pipe
        assert self.parts.keys() == other.parts.keys()
        for name, part in self.parts.items():
            for kind, value in part.items():
                assert _same(value, other.parts[name][kind]), f"{name}: {kind} differ"
        return True


_OF_THE_FIRST_RUN = {"_output_capturing_hooks_installed"}
"""What a forward of Transformers leaves on its model, adapted or not."""


def _state(model: nn.Module) -> dict[str, Any]:
    return {
        "modules": {name: type(module) for name, module in model.named_modules()},
        "identities": {name: id(module) for name, module in model.named_modules()},
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "trainable": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "attributes": {name: set(module.__dict__) - _OF_THE_FIRST_RUN for name, module in model.named_modules()},
        "hooks": {
            name: (len(module._forward_pre_hooks), len(module._forward_hooks), len(module._forward_hooks_with_kwargs))
            for name, module in model.named_modules()
        },
        "adapters": {
            name: (list(module.active_adapters), module.disable_adapters)
            for name, module in model.named_modules()
            if isinstance(module, BaseTunerLayer)
        },
        "configurations": dict(getattr(model, "peft_config", {})),
    }


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one == other
