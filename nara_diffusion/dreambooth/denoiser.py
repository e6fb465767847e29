"""The trained model: the denoiser and, if trained, the text encoders, with their adapters.

The model is one module with one forward, so that hooks, DistributedDataParallel and gradient
accumulation apply to all of it. The adapter in the denoiser reads λ from the denoiser's timestep.
Text encoders run before λ is known, so their adapters have C = I.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import fields, replace
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from peft import (
    LoraConfig,
    PeftConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from torch import Tensor, nn

from nara_diffusion import NaraConfig
from nara_diffusion.loaders.components import check_storable
from nara_diffusion.noise.context import find_holders
from nara_diffusion.training.adapters import CORE_FIELDS, check_target_modules
from nara_diffusion.training.engines import recompute_activations

from .families import Family, Placed
from .pipelines import family_of
from .swaps import checkpoint_of, resident

ADAPTER = "default"
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


class AdaptedDenoiser(nn.Module):
    """The denoisers of `pipe` with adapters, and its text encoders if `train_text_encoder`.

    The trained weights are float32; all other weights keep their dtype. The modules of `pipe` are
    adapted in place.

    Args:
        pipe: a pipeline of a known family, with frozen weights.
        config: the configuration of the denoiser's adapter, from PEFT or for a NaRA. `text_config`
            derives the configuration for the text encoders.
        family: the family of `pipe`, with the settings of the run; by default with the family's own
            settings.

    Raises:
        ValueError: a target module isn't in the denoiser, or a pipeline couldn't save and load the
            NaRA.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        config: PeftConfig,
        *,
        train_text_encoder: bool = False,
        gradient_checkpointing: bool = False,
        family: Family | None = None,
    ) -> None:
        super().__init__()
        self.family = family_of(pipe) if family is None else family
        if isinstance(config, NaraConfig):
            check_storable(config, self.family.denoiser)
        self.pipe = pipe  # not a module: it saves the adapter and has the tokenizers
        self.config = config
        for name in self.family.trained:
            base = getattr(pipe, name)
            if gradient_checkpointing:
                base.enable_gradient_checkpointing(checkpoint_of(base))
            with resident(base):
                setattr(self, name, adapt(base, deepcopy(config)))  # PEFT writes into it
            for holder in find_holders(getattr(self, name)):
                holder.finder.length = pipe.scheduler.config.get("num_train_timesteps")
        for name in self.family.text_encoders if train_text_encoder else ():
            encoder = getattr(pipe, name)
            if gradient_checkpointing:
                recompute_activations(encoder)
            setattr(self, name, adapt(encoder, deepcopy(text_config(config))))
            if name in self.family.cut_short:
                _freeze_last_layer(encoder)

    @property
    def denoiser(self) -> Any:
        """The first trained denoiser, with its adapter."""
        return getattr(self, self.family.trained[0])

    @property
    def components(self) -> dict[str, Any]:
        """The trained models, by their names in the pipeline."""
        names = (*self.family.trained, *self.family.text_encoders)
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters, by name."""
        return {key: value for key, value in self.named_parameters() if value.requires_grad}

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        time_ids: Tensor,
        prompts: list[str] | None = None,
        embeddings: Placed | None = None,
        sources: Sequence[Tensor] = (),
        expert: str | None = None,
    ) -> Tensor:
        """Return the prediction (b, c, h, w), as the objective defines it.

        Args:
            sample: the corrupted latents (b, c, h, w).
            timestep: (b,).
            time_ids: (b, 6).
            prompts: b prompts, if the text encoders are trained.
            embeddings: the prompts' embeddings, `placed`, if the text encoders are frozen.
            sources: latents of the images to edit, each (b, c, h_i, w_i).
            expert: the name of the denoiser to call; None means the first trained one.
        """
        if embeddings is None:
            assert prompts is not None
            embeddings = self.family.encode(self.pipe, prompts)
        denoiser = self.denoiser if expert is None else getattr(self, expert)
        return self.family.predict(denoiser, sample, timestep, time_ids, embeddings, sources)


def adapt(model: nn.Module, config: PeftConfig, name: str = ADAPTER) -> nn.Module:
    """Add the adapter to `model` in place, and return the adapted model.

    The model is returned in PEFT's wrapper if PEFT keeps state there. Adapters are float32. In the
    dtype of the base layer, which PEFT would use, small steps would be lost.
    """
    check_target_modules(model, getattr(config, "target_modules", None))
    adapted = model
    if isinstance(config, LoraConfig):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            inject_adapter_in_model(config, model, adapter_name=name)
    else:
        base: Any = model  # get_peft_model takes any module, but is declared for Transformers' only
        adapted = get_peft_model(base, config, adapter_name=name)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def text_config(config: PeftConfig) -> PeftConfig:
    """Return the adapter configuration for text encoders: `config` with other targets and C = I.

    C is fixed since text encoders run before λ is known.
    """
    changes: dict[str, Any] = {"target_modules": TEXT_TARGETS}
    if isinstance(config, NaraConfig):
        for field in fields(NaraConfig):
            if field.name in CORE_FIELDS:
                changes[field.name] = field.default
        changes["core_type"] = "identity"
    return replace(config, **changes)


def _freeze_last_layer(encoder: nn.Module) -> None:
    """Freeze the last layer: SDXL reads the states before it, so it would never get a gradient."""
    for name, module in encoder.named_modules():
        if name.endswith("encoder.layers") and isinstance(module, nn.ModuleList):
            module[-1].requires_grad_(False)
        elif name.endswith("final_layer_norm"):
            module.requires_grad_(False)
