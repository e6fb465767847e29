"""Diffusers' pipelines of language models: the methods for adapters that they lack.

LLaDA2Pipeline and DiffusionGemmaPipeline have their model as component `model`, and no LoRA methods. As the first
adapter is loaded, the class gets them. λ is told by the user: `noise_level(pipe.model, …)`, or once by
`set_noise_source(pipe.model, source)`, for which `noise.sources.BlockMasks` is one.
"""

from __future__ import annotations

from typing import Any

from nara_diffusion.tuner.strength import set_strength

from .insertion import adapters_of, remove, tuner_layers

COMPONENT = "model"
_PIPELINES = ("LLaDA2Pipeline", "DiffusionGemmaPipeline")


def text_pipeline(pipe: Any) -> type | None:
    """Which of the two `pipe` is: the class, or None."""
    return next((kind for kind in type(pipe).__mro__ if kind.__name__ in _PIPELINES), None)


def extend(kind: type) -> None:
    """Add Diffusers' methods for adapters to one of them. Harmless when repeated."""
    for method in (set_adapters, get_active_adapters, delete_adapters, disable_lora, enable_lora):
        if not hasattr(kind, method.__name__):
            setattr(kind, method.__name__, method)


def activate(model: Any, adapter_names: str | list[str], adapter_weights: Any = None) -> None:
    """`set_adapters`, below, for a pipeline with this language model."""
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    _check_names(model, names)
    weights = adapter_weights if isinstance(adapter_weights, list) else [adapter_weights] * len(names)
    if len(weights) != len(names):
        raise ValueError(f"adapter_weights has {len(weights)} values for {len(names)} adapters: pass one each.")
    for name, weight in zip(names, weights, strict=True):
        set_strength(model, name, 1.0 if weight is None else weight)
    for layer in tuner_layers(model):
        layer.set_adapter(names)


def set_adapters(self: Any, adapter_names: str | list[str], adapter_weights: Any = None) -> None:
    """Activate adapters of the model, at strengths: numbers or StrengthSchedules, one for all or one each; None is 1.

    A number multiplies the schedule that an adapter has; a schedule replaces it.

    Raises:
        ValueError: there is no such adapter, or another number of weights.
    """
    activate(self.model, adapter_names, adapter_weights)


def get_active_adapters(self: Any) -> list[str]:
    """The names of the active adapters."""
    return next((list(layer.active_adapters) for layer in tuner_layers(self.model)), [])


def delete_adapters(self: Any, adapter_names: str | list[str]) -> None:
    """Remove adapters of the model. Raises ValueError if one isn't there."""
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    _check_names(self.model, names)
    remove(self.model, names)


def disable_lora(self: Any) -> None:
    """Switch all adapters off."""
    for layer in tuner_layers(self.model):
        layer.enable_adapters(enabled=False)


def enable_lora(self: Any) -> None:
    """Switch the active adapters on again."""
    for layer in tuner_layers(self.model):
        layer.enable_adapters(enabled=True)


def _check_names(model: Any, names: list[str]) -> None:
    unknown = [name for name in names if name not in adapters_of(model)]
    if unknown:
        there = ", ".join(map(repr, adapters_of(model))) or "none"
        raise ValueError(f"There is no adapter {unknown[0]!r}: the model has {there}.")
