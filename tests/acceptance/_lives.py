"""The life of a NaRA in a pipeline beside that of the equal LoRAs in stock Diffusers.

At one λ the NaRA with s B C(λ) A is the LoRA with B' = s B C(λ) and A, at Diffusers' default scale of 1. So for each of
two λ there is a pipeline with this LoRA, folded by hand in float64 from the NaRA's file. All go through the same calls;
then each row of the NaRA's UNet, at its own timestep, has to be that of the LoRA of its λ.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file
from torch import Tensor

from nara_diffusion import NaraConfig
from tests.acceptance._by_hand import core_by_hand
from tests.acceptance._files import METADATA, header
from tests.acceptance._files import PIPELINE_WEIGHTS as FILE
from tests.helpers import adapted as tiny
from tests.helpers.adapted import disturb as fill
from tests.helpers.rounding import assert_far, assert_near
from tests.helpers.small_pipelines import pixels, small_sd

__all__ = ["Lives", "add_nara", "assert_far", "assert_near", "fill", "frozen_sd", "pixels", "predict", "save_lora"]
TARGETS = ["to_q", "to_out.0", "proj_in", "resnets.0.conv1", "resnets.1.time_emb_proj"]
FEW_TARGETS = ["to_q", "to_v", "proj_out"]
TEXT_TARGETS = ["q_proj", "fc1"]
LEVELS = [0.37, 0.9]
TIMESTEPS = torch.tensor([370, 900, 370])

Call = Callable[[Any], Any]


def nara_config(**changes: Any) -> NaraConfig:
    return tiny.nara_config(**{"target_modules": TARGETS, **changes})


def frozen_sd() -> StableDiffusionPipeline:
    pipe = small_sd()
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        part.requires_grad_(False)
    return pipe


def add_nara(pipe: Any, name: str = "default", seed: int = 1, **changes: Any) -> Any:
    """Add an adapter to the UNet, as training does, and leave it filled."""
    pipe.unet.add_adapter(nara_config(**changes), name)
    fill(pipe.unet, name, seed=seed)
    return pipe


def save_nara(folder: Path, *, seed: int = 1, text: bool = False, **changes: Any) -> Path:
    """The folder of a filled NaRA of the UNet and, with `text`, of a static one of the text encoder."""
    torch.manual_seed(seed)  # the frequencies
    pipe = add_nara(frozen_sd(), seed=seed, **changes)
    if text:
        static = nara_config(core_type="identity", r=3, lora_alpha=4, target_modules=TEXT_TARGETS)
        inject_adapter_in_model(static, pipe.text_encoder)
        fill(pipe.text_encoder, seed=seed + 10)
    pipe.save_nara_weights(folder)
    return folder


# ---------------------------------------------------------------- the equal LoRA, by hand


def as_lora(folder: Path, level: float) -> dict[str, Tensor]:
    """The tensors of the LoRA that the NaRA in `folder` is at λ = `level`, at α = r."""
    tensors = {name: tensor.double() for name, tensor in load_file(folder / FILE).items()}
    lora = {}
    for component, config in header(folder / FILE)[METADATA]["components"].items():
        prefix = f"{component}.nara_core.shared."
        part = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        core = core_by_hand(SimpleNamespace(**config), part, torch.tensor([level]), config["r"])  # type: ignore[arg-type]
        scaled = config["lora_alpha"] / config["r"] ** (0.5 if config["use_rslora"] else 1) * core[0]
        for name, tensor in tensors.items():
            if name.startswith(f"{component}.") and "nara_core" not in name:
                folded = torch.einsum("or...,rq->oq...", tensor, scaled) if "lora_B" in name else tensor
                lora[name] = folded.float().contiguous()
    return lora


# ---------------------------------------------------------------- what is compared


def predict(pipe: Any, timesteps: Tensor = TIMESTEPS, *, dtype: Any = torch.float32, **options: Any) -> Tensor:
    """The UNet's output (3, 4, 8, 8), a timestep a row."""
    generator = torch.Generator().manual_seed(9)
    sample, text = torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 5, 16, generator=generator)
    with torch.no_grad():
        return pipe.unet(sample.to(dtype), timesteps, text.to(dtype), **options).sample


class Lives:
    """A pipeline with NaRAs, and for each of LEVELS a stock one with the LoRAs that they are at that λ."""

    def __init__(self) -> None:
        self.nara = frozen_sd()
        self.loras = [self._sibling() for _ in LEVELS]

    def _sibling(self) -> StableDiffusionPipeline:
        parts = self.nara.components
        copies = {name: copy.deepcopy(parts[name]) for name in ("unet", "text_encoder", "scheduler")}
        pipe = StableDiffusionPipeline(**{**parts, **copies}, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def load(self, folder: Path, name: str | None = None, **options: Any) -> Lives:
        self.nara.load_nara_weights(folder, adapter_name=name, **options)
        for level, pipe in zip(LEVELS, self.loras, strict=True):
            pipe.load_lora_weights(as_lora(folder, level), adapter_name=name, **options)
        return self

    def call(self, *calls: Call) -> Lives:
        """The same calls on all pipelines."""
        for method in calls:
            for pipe in (self.nara, *self.loras):
                method(pipe)
        return self

    def expected(self, **options: Any) -> Tensor:
        low, high = (predict(pipe, **options) for pipe in self.loras)
        return torch.stack([low[0], high[1], low[2]])

    def check(self, **options: Any) -> Tensor:
        """Outputs and what Diffusers says about the adapters are those of the LoRAs."""
        actual = predict(self.nara, **options)
        assert_near(actual, self.expected(**options), self.nara.unet)
        self.check_names()
        return actual

    def check_names(self) -> None:
        assert self.nara.get_active_adapters() == self.loras[0].get_active_adapters()
        assert self.nara.get_list_adapters() == self.loras[0].get_list_adapters()

    def check_pixels(self, **options: Any) -> Tensor:
        """Images of the first LoRA: for cores that are I."""
        actual, expected = pixels(self.nara, **options), pixels(self.loras[0], **options)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
        self.check_names()
        return actual


def save_lora(folder: Path, seed: int = 5, **changes: Any) -> dict[str, Tensor]:
    """The tensors of a plain LoRA of the UNet, by Diffusers' names, with α = r."""
    pipe = frozen_sd()
    pipe.unet.add_adapter(LoraConfig(**{"r": 3, "lora_alpha": 3, "target_modules": FEW_TARGETS, **changes}))
    fill(pipe.unet, seed=seed)
    pipe.unet.save_lora_adapter(folder)
    return {f"unet.{name}": t for name, t in load_file(folder / "pytorch_lora_weights.safetensors").items()}
