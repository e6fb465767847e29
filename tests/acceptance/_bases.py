"""The base models that the adapters in files/ belong to, what they are called with, and what they say.

Weights and inputs come from a generator of integers of our own, so that every release of PyTorch and every processor
has the same bytes (files/bases.json has their digests). A value depends on its tensor's name, not on the order in
which a model makes its parameters.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from nara_diffusion import noise_level
from tests.acceptance._text import backbone
from tests.helpers.small_pipelines import MORE_ATTENTION, flux_transformer, small_unet, text_encoder

LEVELS = torch.tensor([0.0625, 0.5, 0.90625])  # exact in float32
TIMESTEPS = torch.tensor([33, 500, 870])

# ---------------------------------------------------------------------- values


def drawn(name: str, *shape: int) -> Tensor:
    """Float32 values in [-1, 1), multiples of 2⁻²³: splitmix64, seeded by the name."""
    with np.errstate(over="ignore"):
        state = np.uint64(zlib.crc32(name.encode()) + 1) * np.uint64(0xD1342543DE82EF95)
        z = state + np.arange(1, math.prod(shape) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    integers = (z >> np.uint64(40)).astype(np.int64) - (1 << 23)
    return torch.from_numpy(integers.astype(np.float32) / np.float32(1 << 23)).reshape(shape)


def filled(model: nn.Module, seed: str) -> Any:
    """`model` in evaluation mode, with values of our own: none is 0, and no norm's weight is 1."""
    for name, parameter in model.named_parameters():
        parameter.data.copy_(_value_of(seed, name.removeprefix("text_model."), parameter.shape))
    return model.eval()


@cache
def _value_of(seed: str, name: str, shape: torch.Size) -> Tensor:
    value = drawn(f"{seed}.{name}", *shape)
    if len(shape) > 1:
        return value * 2.0 ** (1 - round(math.log2(shape[1:].numel()) / 2))  # a power of 2, so nothing is rounded
    return value / 8 + (1 if name.endswith("norm.weight") or (".norm" in name and "weight" in name) else 0)


def digest(model: nn.Module) -> str:
    """SHA-256 of a model's parameters, by name."""
    checksum = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        checksum.update(name.removeprefix("text_model.").encode())
        checksum.update(parameter.detach().contiguous().numpy().tobytes())
    return checksum.hexdigest()


# ---------------------------------------------------------------------- a language model, and one of other layers


def language_model() -> LlamaForCausalLM:
    """Width 16, without a causal mask."""
    model = backbone(29, hidden_size=16, intermediate_size=24)
    model.name_or_path = "tiny-language"  # what the adapters' configurations say, a relative path
    return filled(model, "language")


class Mixed(nn.Module):
    """Tokens (b, l) → (b, l, 5) by an embedding, convolutions without and with groups, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(13, 6)
        self.near = nn.Conv1d(6, 10, 3, padding=1)
        self.groups = nn.Conv1d(10, 8, 1, groups=2)
        self.head = nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.tokens(ids).transpose(1, 2)  # (b, 6, l)
        return self.head(torch.tanh(self.groups(torch.tanh(self.near(h)))).transpose(1, 2))


def mixed_model() -> Mixed:
    return filled(Mixed(), "mixed")


def tokens(below: int) -> Tensor:
    """Ids (3, 7)."""
    return torch.arange(21).view(3, 7) * 5 % below


@torch.no_grad()
def text_output(model: nn.Module) -> Tensor:
    """What a language model, or the mixed one, says at `LEVELS`, a row each."""
    with noise_level(model, LEVELS):
        return plain_text_output(model)


@torch.no_grad()
def plain_text_output(model: nn.Module) -> Tensor:
    """The same where λ is known otherwise, or isn't needed."""
    is_mixed = any(isinstance(module, Mixed) for module in model.modules())
    return model(tokens(13)) if is_mixed else model(input_ids=tokens(29)).logits


@torch.no_grad()
def shipped_output(model: nn.Module) -> Tensor:
    """What an adapted examples/assets/llada-tiny says of the last token at `LEVELS`, a row each."""
    with noise_level(model, LEVELS):
        return model(input_ids=tokens(60)).logits[:, -1]


# ---------------------------------------------------------------------- pipelines


def unet(**changes: Any) -> UNet2DConditionModel:
    """A UNet of SDXL's kind: two levels, as many ResNet blocks a level, attention in the first level up."""
    options = {"layers_per_block": 2, "transformer_layers_per_block": (1, 1), **MORE_ATTENTION}
    return filled(small_unet(20, pooled=12, **{**options, **changes}), "unet")


def sdxl(**unet_changes: Any) -> StableDiffusionXLPipeline:
    """SDXL's pipeline, as far as its adapters need it: UNet, text encoders, scheduler."""
    return StableDiffusionXLPipeline(
        vae=None,
        text_encoder=filled(text_encoder(23, 8, length=8), "text_encoder"),
        text_encoder_2=filled(text_encoder(23, 12, length=8, projection=True), "text_encoder_2"),
        tokenizer=None,
        tokenizer_2=None,
        unet=unet(**unet_changes),
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        add_watermarker=False,
    )


def flux() -> FluxPipeline:
    """FLUX.1-dev's pipeline, as far as an adapter of its transformer needs it."""
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=filled(flux_transformer(pooled_projection_dim=8), "flux"),
    )


def unet_output(model: nn.Module, sample: Tensor, timestep: Any, text: Tensor, pooled: Tensor) -> Tensor:
    time_ids = torch.tensor([[16.0, 16, 0, 4, 16, 16]]).expand(len(sample), 6)
    condition = {"text_embeds": pooled, "time_ids": time_ids.to(sample.dtype)}
    return model(sample, timestep, text, added_cond_kwargs=condition, return_dict=False)[0]


def unet_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """(sample (3, 4, 8, 8), text (3, 5, 20), pooled (3, 12))."""
    return drawn("sample", 3, 4, 8, 8), drawn("text", 3, 5, 20), drawn("pooled", 3, 12)


@torch.no_grad()
def sdxl_outputs(pipe: Any) -> dict[str, Tensor]:
    """What the parts say; the UNet at `TIMESTEPS`, a row each."""
    sample, text, pooled = (tensor.to(pipe.unet.dtype) for tensor in unet_inputs())
    ids = torch.tensor([[21, 3, 9, 17, 4, 22]])
    return {
        "unet": unet_output(pipe.unet, sample, TIMESTEPS, text, pooled),
        "text_encoder": pipe.text_encoder(ids).last_hidden_state,
        "text_encoder_2": pipe.text_encoder_2(ids).text_embeds,
    }


@torch.no_grad()
def flux_outputs(pipe: Any) -> dict[str, Tensor]:
    """What the transformer says at `LEVELS`, its timesteps, a row each."""
    dtype = pipe.transformer.dtype
    return {
        "transformer": pipe.transformer(
            hidden_states=drawn("latents", 3, 4, 16).to(dtype),
            encoder_hidden_states=drawn("prompt", 3, 5, 12).to(dtype),
            pooled_projections=drawn("pooled prompt", 3, 8).to(dtype),
            timestep=LEVELS.to(dtype),
            guidance=torch.tensor([3.5] * 3, dtype=dtype),
            img_ids=torch.tensor([[0.0, row, column] for row in range(2) for column in range(2)]),
            txt_ids=torch.zeros(5, 3),
            return_dict=False,
        )[0]
    }


BASES: dict[str, Callable[[], Any]] = {
    "language": language_model,
    "mixed": mixed_model,
    "unet": unet,
    "text_encoder": lambda: sdxl().text_encoder,
    "text_encoder_2": lambda: sdxl().text_encoder_2,
    "flux": lambda: flux().transformer,
}
PIPELINES: dict[str, tuple[Callable[[], Any], Callable[[Any], dict[str, Tensor]]]] = {
    "sdxl": (sdxl, sdxl_outputs),
    "sdxl_unet": (sdxl, sdxl_outputs),
    "flux": (flux, flux_outputs),
}
"""{file in files/pipelines, without its dtype: (its base, what that says)}."""
