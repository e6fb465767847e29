"""What is trained: the UNet with its adapter, and the text encoders where they are trained too, as one module.

One module has one forward, so that hooks, DistributedDataParallel and gradient accumulation see all of it. λ reaches
the adapter in the UNet through the UNet's own timestep. Text encoders run before there is a λ, so their adapters
have C = I.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import inject_adapter_in_model, set_peft_model_state_dict
from torch import Tensor, nn

from nara_diffusion import NaraConfig
from nara_diffusion.dreambooth.prompts import encode_prompts
from nara_diffusion.loaders.source import read_adapter
from nara_diffusion.training.adapter import check_target_modules, recompute_activations

ADAPTER = "default"
UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


class AdaptedDenoiser(nn.Module):
    """The UNet of `pipe` with a new adapter, and its text encoders with static ones if `train_text_encoder`.

    Adapters are float32 and trainable, all else stays as it is. The modules are those of `pipe`.

    Args:
        pipe: an SDXL pipeline with frozen weights.
        config: of the UNet's adapter; that of the text encoders has its rank, scale and dropout.
        train_text_encoder: also adapt both text encoders.
        gradient_checkpointing: recompute activations in the backward.

    Raises:
        ValueError: a target module that the UNet lacks.
    """

    def __init__(
        self, pipe: Any, config: Any, *, train_text_encoder: bool = False, gradient_checkpointing: bool = False
    ) -> None:
        super().__init__()
        check_target_modules(pipe.unet, config.target_modules)
        self.pipe = pipe  # not a module: it saves the adapter, and holds the tokenizers
        self.unet = pipe.unet
        if gradient_checkpointing:
            pipe.unet.enable_gradient_checkpointing()
        _adapt(pipe.unet, config)
        if train_text_encoder:
            self.text_encoder, self.text_encoder_2 = pipe.text_encoder, pipe.text_encoder_2
            static = replace(
                config, core_type="identity", core_sharing="global", target_modules=TEXT_TARGETS, noise_convention=None
            )
            for encoder in (self.text_encoder, self.text_encoder_2):
                if gradient_checkpointing:
                    recompute_activations(encoder)
                _adapt(encoder, replace(static))
            _freeze_last_layer(self.text_encoder)

    @property
    def text_encoders(self) -> list[Any] | None:
        """The text encoders that are trained, if any."""
        return [self.text_encoder, self.text_encoder_2] if hasattr(self, "text_encoder") else None

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        time_ids: Tensor,
        prompts: list[str] | None = None,
        embeddings: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The UNet's prediction (b, c, h, w).

        Args:
            sample: (b, c, h, w), corrupted latents.
            timestep: (b,).
            time_ids: (b, 6).
            prompts: b texts, for text encoders that are trained; or instead
            embeddings: of frozen ones, (b, l, d) and pooled (b, p).
        """
        if embeddings is None:
            assert prompts is not None
            assert self.text_encoders is not None
            embeddings = encode_prompts(tokenizers_of(self.pipe), self.text_encoders, prompts)
        return predict(self.unet, sample, timestep, time_ids, embeddings)


def predict(unet: Any, sample: Tensor, timestep: Tensor, time_ids: Tensor, embeddings: tuple[Tensor, Tensor]) -> Tensor:
    """SDXL's UNet called as its pipeline does; shapes as in `AdaptedDenoiser.forward`."""
    dtype = next(unet.parameters()).dtype  # `unet.dtype` walks over all modules
    states, pooled = (tensor.to(dtype) for tensor in embeddings)
    # sizes and places beyond 256 pixels aren't whole numbers of bf16
    conditions = {"text_embeds": pooled, "time_ids": time_ids.float()}
    return unet(
        sample.to(dtype), timestep, encoder_hidden_states=states, added_cond_kwargs=conditions, return_dict=False
    )[0]


def tokenizers_of(pipe: Any) -> list[Any]:
    return [pipe.tokenizer, pipe.tokenizer_2]


def write_adapter(model: AdaptedDenoiser, folder: Path, state: dict[str, Any]) -> None:
    """An `AdapterWriter`: pytorch_nara_weights.safetensors. The weights are the model's own, as `state` has them."""
    model.pipe.save_nara_weights(folder, adapter_name=ADAPTER)


def read_checkpoint(model: AdaptedDenoiser, folder: Path) -> None:
    """Puts the adapter of a checkpoint into `model`, in float32, before accelerate wraps it."""
    for component, part in read_adapter(folder, "unet").items():
        set_peft_model_state_dict(getattr(model, component), part.tensors, adapter_name=ADAPTER)


def _adapt(model: nn.Module, config: NaraConfig) -> None:
    """Adds the adapter in float32: what is injected has the dtype of its base layer, in which small steps are lost."""
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _freeze_last_layer(encoder: nn.Module) -> None:
    """SDXL reads the first text encoder's states before its last layer, whose adapter would never get a gradient."""
    numbers = {name: re.search(r"layers\.(\d+)\.", name) for name, _ in encoder.named_parameters()}
    last = max(int(match[1]) for match in numbers.values() if match)
    for name, parameter in encoder.named_parameters():
        match = numbers[name]
        if match and int(match[1]) == last:
            parameter.requires_grad_(False)
