"""What is rehearsed at true size without weights: the base of all models, and denoisers of images and videos."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from nara_diffusion import NaraConfig
from nara_diffusion.training.engines import recompute_activations

RANK = 16


class Rehearsed:
    """A model in bfloat16 on meta, with an adapter or without: the base of `Denoiser`, `Text` and `Canvas`.

    Attributes:
        targets: the modules to adapt.
        billions: parameters of the model.
        passes: forwards of each adapted layer in a training step, checkpointing aside.
        saving: how many times less checkpointing keeps, at least.
        unused: a part of the names of layers that nothing reads, and that get no gradient.
    """

    targets: list[str] | str
    billions: float
    passes = 1
    saving = 3.0
    unused = "none"

    def build(self) -> Any:
        """Return the model, where meta is the default device."""
        raise NotImplementedError

    def frozen(self) -> Any:
        with torch.device("meta"):
            model = self.build()
        return model.to(torch.bfloat16).requires_grad_(False).eval()

    def alone(self) -> Any:
        """Return the model without an adapter, to count its own kernels."""
        return self.frozen()

    def adapted(self, **options: Any) -> Any:
        """Return the model with a NaRA of rank 16 in float32."""
        config = NaraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=self.targets, **options)
        model = self.frozen()
        with torch.device("meta"):
            return self.insert(model, config)

    def insert(self, model: Any, config: NaraConfig) -> Any:
        return get_peft_model(model, config)

    def save(self, model: Any, folder: Path) -> Path:
        """Return the file with the adapter's weights."""
        model.save_pretrained(folder)
        return folder / "adapter_model.safetensors"

    def load(self, folder: Path) -> Any:
        """Return a new model with the adapter in `folder`."""
        return PeftModel.from_pretrained(self.frozen(), folder)

    def checkpoint(self, model: Any, is_on: bool) -> None:
        """Turn gradient checkpointing on or off."""
        if is_on:
            recompute_activations(model.get_base_model())
        else:
            model.get_base_model().activation_checkpointing_disable()

    def loss(self, model: Any, device: str) -> Tensor:
        """Return the scalar loss of two samples with a λ each. The inputs of the first layer get a gradient too."""
        raise NotImplementedError

    def sample(self, model: Any, device: str) -> Tensor:
        """Return what the model predicts in a step of sampling with guidance."""
        raise NotImplementedError


# ---------------------------------------------------------------------- images


@dataclass
class Denoiser(Rehearsed):
    """A denoiser of a Diffusers pipeline.

    Attributes:
        inputs: (draw, number of samples) → the arguments of a forward; `draw(*shape)` returns a tensor.
        latents: the name of the argument that has the noisy latents.
    """

    pipeline: Any
    kind: Any
    fields: dict[str, Any]
    billions: float
    inputs: Callable[[Callable[..., Tensor], int], dict[str, Any]]
    latents: str = "hidden_states"
    targets: list[str] | str = "all"
    unused: str = "none"

    @property
    def component(self) -> str:
        return "unet" if "unet" in inspect.signature(self.pipeline).parameters else "transformer"

    def build(self) -> Any:
        return self.kind.from_config(self.fields)

    def insert(self, model: Any, config: NaraConfig) -> Any:
        model.add_adapter(config)
        return model

    def around(self, denoiser: nn.Module) -> Any:
        """Return the pipeline of `denoiser`, without its other models."""
        names = dict(inspect.signature(self.pipeline).parameters)
        required = [name for name, parameter in names.items() if parameter.default is inspect.Parameter.empty]
        is_flow = self.component == "transformer"
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler() if is_flow else diffusers.DDPMScheduler()
        return self.pipeline(**{**dict.fromkeys(required), self.component: denoiser, "scheduler": scheduler})

    def save(self, model: Any, folder: Path) -> Path:
        self.around(model).save_nara_weights(folder)
        (file,) = folder.glob("*.safetensors")
        return file

    def load(self, folder: Path) -> Any:
        model = self.frozen()
        self.around(model).load_nara_weights(folder)
        return model.to("meta")  # where all layers are on meta, their core is loaded to the CPU

    def checkpoint(self, model: Any, is_on: bool) -> None:
        (model.enable_gradient_checkpointing if is_on else model.disable_gradient_checkpointing)()

    def loss(self, model: Any, device: str) -> Tensor:
        inputs = self.inputs(partial(torch.randn, dtype=torch.bfloat16, device=device), 2)
        for name in (self.latents, "encoder_hidden_states"):
            inputs[name].requires_grad_()
        output = model(**inputs, return_dict=False)[0]
        return (output.float() - torch.randn_like(output)).square().mean()

    def sample(self, model: Any, device: str) -> Tensor:
        inputs = self.inputs(partial(torch.randn, dtype=torch.bfloat16, device=device), 4)
        inputs["timestep"] = inputs["timestep"][0].expand(4)
        return model(**inputs, return_dict=False)[0]


def sdxl_inputs(draw: Callable[..., Tensor], n: int) -> dict[str, Any]:
    return {
        "sample": draw(n, 4, 128, 128),
        "timestep": draw(n, dtype=torch.float32),
        "encoder_hidden_states": draw(n, 77, 2048),
        "added_cond_kwargs": {"text_embeds": draw(n, 1280), "time_ids": draw(n, 6)},
    }


def sd3_inputs(draw: Callable[..., Tensor], n: int) -> dict[str, Any]:
    return {
        "hidden_states": draw(n, 16, 128, 128),
        "timestep": draw(n, dtype=torch.float32),
        "encoder_hidden_states": draw(n, 333, 4096),
        "pooled_projections": draw(n, 2048),
    }


def flux_inputs(draw: Callable[..., Tensor], n: int) -> dict[str, Any]:
    return {
        "hidden_states": draw(n, 4096, 64),
        "timestep": draw(n),
        "encoder_hidden_states": draw(n, 512, 4096),
        "pooled_projections": draw(n, 768),
        "guidance": draw(n),
        "img_ids": draw(4096, 3),
        "txt_ids": draw(512, 3),
    }


def qwen_inputs(draw: Callable[..., Tensor], n: int) -> dict[str, Any]:
    return {
        "hidden_states": draw(n, 4096, 64),
        "timestep": draw(n),
        "encoder_hidden_states": draw(n, 512, 3584),
        "img_shapes": [[(1, 64, 64)]] * n,
    }


def wan_inputs(draw: Callable[..., Tensor], n: int) -> dict[str, Any]:
    """Of 81 frames of 480 × 832 pixels."""
    return {
        "hidden_states": draw(n, 16, 21, 60, 104),
        "timestep": draw(n, dtype=torch.float32),
        "encoder_hidden_states": draw(n, 512, 4096),
    }
