"""Find the components of a pipeline that can be adapted, and the adapters in each model."""

from __future__ import annotations

from typing import Any, Protocol

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from nara_diffusion.config import NaraConfig, unscaled_fields
from nara_diffusion.cores.registry import needs_noise
from nara_diffusion.strict import adapter_tensors
from nara_diffusion.tuner.holder import holder_of

from .adapter_part import AdapterPart

DENOISERS = (
    "unet",
    "transformer",
    "transformer_2",
    "unconditional_transformer",
    "prior",
    "decoder",
    "model",
)
"""The components of pipelines that denoise.

A second transformer is for little noise (Wan 2.2) or for guidance (Ideogram 4). unCLIP, Kandinsky,
Würstchen and Stable Cascade have a prior, which makes embeddings, and a decoder. Pipelines of text
have a model.
"""
TEXT_ENCODER = "text_encoder"
"""The prefix of the names of text encoders among the components."""


class Pipeline(Protocol):
    """A Diffusers pipeline, or some of its models (`PipelineComponents`)."""

    @property
    def components(self) -> dict[str, Any]: ...


def denoiser_name(pipe: Pipeline) -> str:
    """Return the name of the component for an adapter without named parts.

    Raises:
        ValueError: the pipeline has no denoiser.
    """
    for name in DENOISERS:
        if isinstance(getattr(pipe, name, None), nn.Module):
            return name
    raise ValueError(
        f"{type(pipe).__name__} has no denoiser that a NaRA can adapt. Its components are "
        f"{', '.join(map(repr, pipe.components))}; expected one of {', '.join(DENOISERS)}."
    )


def adaptable_models(pipe: Pipeline) -> dict[str, nn.Module]:
    """Return {component: model} for all components that can be adapted, denoisers first.

    Raises:
        ValueError: the pipeline has no denoiser.
    """
    denoiser_name(pipe)
    denoisers = [name for name in pipe.components if name in DENOISERS]
    encoders = [name for name in pipe.components if name.startswith(TEXT_ENCODER)]
    models = {name: uncompiled(getattr(pipe, name)) for name in [*denoisers, *encoders]}
    return {name: model for name, model in models.items() if isinstance(model, nn.Module)}


def uncompiled(model: Any) -> Any:
    """Return the original of a model that was compiled, or any other object unchanged."""
    return getattr(model, "_orig_mod", model)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the base model of a PeftModel, including adapters, or any other model unchanged."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def tuner_layers(model: nn.Module) -> list[BaseTunerLayer]:
    """Return all of PEFT's layers in `model`, of any kind."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def adapters_of(model: nn.Module) -> dict[str, Any]:
    """Return {adapter name: configuration} for all adapters."""
    return getattr(model, "peft_config", None) or {}


def nara_adapters_of(model: nn.Module) -> dict[str, NaraConfig]:
    """Return {adapter name: configuration} for the NaRA adapters."""
    configs = adapters_of(model)
    return {name: configs[name] for name in configs if isinstance(configs[name], NaraConfig)}


def part_of(model: nn.Module, adapter_name: str) -> AdapterPart:
    """Return the adapter's configuration and tensors, in the form that files contain."""
    return AdapterPart(adapters_of(model)[adapter_name], adapter_tensors(model, adapter_name))


def follow_scheduler(pipe: Any) -> None:
    """Make the denoisers' adapters take N and the meaning of t from the current scheduler."""
    for name, model in adaptable_models(pipe).items():
        holder = holder_of(unwrapped(model))
        if holder is not None and name in DENOISERS:
            holder.finder.add_pipeline(pipe)


def check_not_wrapped(model: nn.Module, component: str, method: str) -> None:
    """Raise ValueError if a component is a PeftModel, for which `method` does not work."""
    if isinstance(model, PeftModel):
        raise ValueError(
            f"{component} is a PeftModel, and pipe.{method} cannot change its adapters. First put its base model, "
            f"which includes the adapters, into the pipeline: pipe.{component} = pipe.{component}.get_base_model(). "
            "Or use its own methods: load_adapter, set_adapter, delete_adapter, unload."
        )


def check_storable(config: NaraConfig, component: str) -> None:
    """Raise ValueError if the adapter could not run in `component`, or be unloaded from it."""
    if component.startswith(TEXT_ENCODER) and needs_noise(config):
        raise ValueError(
            f"The adapter of {component} has core_type={config.core_type!r}, but text encoders run "
            'before there is a λ: use NaraConfig(core_type="identity", …) there.'
        )
    for name in unscaled_fields(config):
        value = getattr(config, name)
        if value and name != "lora_bias":  # a bias of B goes with its layer
            raise ValueError(
                f"The adapter of {component} has {name}={value!r}, which changes the base model itself, so unloading "
                "could not restore it. Train without it, or use peft.PeftModel's save_pretrained and from_pretrained "
                "on the component."
            )
