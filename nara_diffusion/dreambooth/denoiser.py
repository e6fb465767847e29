"""What is trained: the denoiser, and the text encoders where they are trained too, with their adapters, as one module.

One module has one forward, so that hooks, DistributedDataParallel and gradient accumulation see all of it. λ reaches
the adapter in the denoiser through the denoiser's own timestep. Text encoders run before there is a λ, so their
adapters have C = I.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import fields, replace
from typing import Any

from peft import LoraConfig, PeftConfig, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn

from nara_diffusion import NaraConfig
from nara_diffusion.loaders.insertion import check_storable
from nara_diffusion.noise.level import find_holders
from nara_diffusion.training.adapters import CORE_FIELDS, check_target_modules, recompute_activations

from .family import Embeddings, Family
from .pipelines import family_of

ADAPTER = "default"
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


class AdaptedDenoiser(nn.Module):
    """The denoiser of `pipe` as it is fine-tuned, and its text encoders if `train_text_encoder`.

    What is trained is float32, all else stays as it is. The modules are those of `pipe`.

    Args:
        pipe: a pipeline of a known family with frozen weights.
        config: of the denoiser's adapter, PEFT's or NaRA's; see `text_config` for that of the text encoders.
        scheduler: of the model that it is converted to; None where it isn't.
        family: of `pipe`, with the conditions of the run; None takes its defaults.

    Raises:
        ValueError: a target module that the denoiser lacks; a NaRA that a pipeline couldn't save and load.
    """

    def __init__(
        self,
        pipe: Any,
        config: PeftConfig,
        *,
        train_text_encoder: bool = False,
        gradient_checkpointing: bool = False,
        scheduler: Any = None,
        family: Family | None = None,
    ) -> None:
        super().__init__()
        self.family = family_of(pipe) if family is None else family
        if isinstance(config, NaraConfig):
            check_storable(config, self.family.denoiser)
        self.pipe = pipe  # not a module: it saves the adapter, and holds the tokenizers
        self.config, self.scheduler = config, scheduler
        base = getattr(pipe, self.family.denoiser)
        if gradient_checkpointing:
            base.enable_gradient_checkpointing()
        setattr(self, self.family.denoiser, adapt(base, config))
        for holder in find_holders(self.denoiser):
            holder.length = (scheduler or pipe.scheduler).config.get("num_train_timesteps")
        for name in self.family.text_encoders if train_text_encoder else ():
            encoder = getattr(pipe, name)
            if gradient_checkpointing:
                recompute_activations(encoder)
            setattr(self, name, adapt(encoder, deepcopy(text_config(config))))  # PEFT writes into it
            if name in self.family.cut_short:
                _freeze_last_layer(encoder)

    @property
    def denoiser(self) -> Any:
        """The denoiser, with its adapter."""
        return getattr(self, self.family.denoiser)

    @property
    def components(self) -> dict[str, Any]:
        """The models that are trained, by their names in the pipeline."""
        names = (self.family.denoiser, *self.family.text_encoders)
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        time_ids: Tensor,
        prompts: list[str] | None = None,
        embeddings: Embeddings | None = None,
    ) -> Tensor:
        """The prediction (b, c, h, w), in the objective's terms, of corrupted latents (b, c, h, w), timestep (b,) and
        time_ids (b, 6); of b `prompts`, for text encoders that are trained, or of the `embeddings` of frozen ones."""
        if embeddings is None:
            assert prompts is not None
            embeddings = self.family.encode(self.pipe, prompts)
        return self.family.predict(self.denoiser, sample, timestep, time_ids, embeddings)


def adapt(model: Any, config: PeftConfig, name: str = ADAPTER) -> Any:
    """`model` with the adapter; itself changed; wrapped where PEFT keeps state.

    Adapters are float32: what PEFT injects has the dtype of its base layer, in which small steps are lost.
    """
    check_target_modules(model, getattr(config, "target_modules", None))
    if isinstance(config, LoraConfig):
        inject_adapter_in_model(config, model, adapter_name=name)
    else:
        model = get_peft_model(model, config, adapter_name=name)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def text_config(config: PeftConfig) -> PeftConfig:
    """The configuration for text encoders: the denoiser's own with other targets, and, since they run before there is
    a λ, with C = I."""
    own: dict[str, Any] = {}
    if isinstance(config, NaraConfig):
        own = {field.name: field.default for field in fields(NaraConfig) if field.name in CORE_FIELDS}
        own["core_type"] = "identity"
    return replace(config, **own, target_modules=TEXT_TARGETS)


def _freeze_last_layer(encoder: nn.Module) -> None:
    """SDXL reads the first text encoder's states before its last layer, so what follows would never get a gradient."""
    for name, module in encoder.named_modules():
        if name.endswith("encoder.layers"):
            module[-1].requires_grad_(False)  # type: ignore[index]
        elif name.endswith("final_layer_norm"):
            module.requires_grad_(False)
