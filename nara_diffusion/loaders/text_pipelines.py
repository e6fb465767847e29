"""Diffusers' pipelines of language models: λ in each of their forwards, and the methods that they lack.

LLaDA2Pipeline and DiffusionGemmaPipeline have their model as component `model`, and no LoRA methods. As the first
adapter is loaded, the class gets them, and around each call stands a source of λ (see `noise.text_blocks`), unless a
user has set one.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from nara_diffusion.layers.variants import NaraVariant
from nara_diffusion.noise.context import active_signals
from nara_diffusion.noise.signals import NoiseSource
from nara_diffusion.noise.text_blocks import CANVAS_SCHEDULERS, BlockMasks, CanvasNoise
from nara_diffusion.runtime.modules import find_holders
from nara_diffusion.tuner.activation import tuner_layers
from nara_diffusion.tuner.strength.set_strength import set_strength
from nara_diffusion.utils.patching import around

from .insertion import adapters_of, remove

COMPONENT = "model"
_RUNNING: set[NoiseSource] = set()
"""The sources of calls that have not returned."""


def text_pipeline(pipe: Any) -> type | None:
    """Which of the two `pipe` is: the class, or None."""
    return next((kind for kind in type(pipe).__mro__ if kind.__name__ in _CALLS), None)


def extend(kind: type) -> None:
    """Put λ around the calls of one of them, and add Diffusers' methods for adapters. Harmless when repeated."""
    around(kind, "__call__", _CALLS[kind.__name__])
    for method in (set_adapters, get_active_adapters, delete_adapters, disable_lora, enable_lora):
        if not hasattr(kind, method.__name__):
            setattr(kind, method.__name__, method)


# ---------------------------------------------------------------------- λ


def _call_llada2(original: Callable[..., Any], pipe: Any, *args: Any, **kwargs: Any) -> Any:
    holders = _without_source(pipe.model)
    if not holders:
        return original(pipe, *args, **kwargs)
    given = inspect.signature(original).bind(pipe, *args, **kwargs).arguments
    mask = given.get("mask_token_id")
    mask = pipe.mask_token_id if mask is None else mask
    if mask is None:
        raise ValueError("mask_token_id is not known, by which λ is counted: pass it, or give the tokenizer one.")
    length = given.get("block_length") or pipe.scheduler.config.block_length
    with _reading(holders, BlockMasks(mask, length)):
        return original(pipe, *args, **kwargs)


def _call_gemma(original: Callable[..., Any], pipe: Any, *args: Any, **kwargs: Any) -> Any:
    holders = _without_source(pipe.model)
    if not holders:
        return original(pipe, *args, **kwargs)
    kind = type(pipe.scheduler).__name__
    if kind not in CANVAS_SCHEDULERS:
        raise ValueError(
            f"λ can't be told with {kind}: choose one of {', '.join(CANVAS_SCHEDULERS)}, or tell λ yourself, by "
            "set_noise_source(pipe.model, source)."
        )
    _check_encoder(pipe.model, holders)
    source = CanvasNoise()
    with _reading(holders, source), _telling(pipe.scheduler, source):
        return original(pipe, *args, **kwargs)


def _without_source(model: Any) -> list[Any]:
    """The holders of `model` that need λ, and that nobody tells it, by a source or by `noise_level(…)`.

    Raises:
        ValueError: another call of a pipeline with this model is running, whose λ these forwards would read.
    """
    if not isinstance(model, nn.Module):
        return []
    holders = list(find_holders(model))
    if any(holder.conventions.source is source for holder in holders for source in list(_RUNNING)):
        raise ValueError(
            "another call of a pipeline with this model is running, in another thread or around this one, and its λ "
            "would be read here: make the calls one after another, or give each a pipeline and model of its own."
        )
    return [
        holder
        for holder in holders
        if holder.needs_noise and holder.conventions.source is None and active_signals(holder.channel) is None
    ]


@contextmanager
def _reading(holders: list[Any], source: NoiseSource) -> Iterator[None]:
    """Inside, `source` tells λ. An adapter that names no definition of λ takes that of `source`, for good."""
    for holder in holders:
        holder.conventions.check_source(source)
    _RUNNING.add(source)
    for holder in holders:
        holder.adopt_convention(source.convention)
        holder.conventions.source = source
    try:
        yield
    finally:
        for holder in holders:
            holder.conventions.source = None
        _RUNNING.discard(source)


@contextmanager
def _telling(scheduler: Any, source: CanvasNoise) -> Iterator[None]:
    """Inside, `scheduler.step` tells `source` what it did. Corrections in between keep the noise as it is."""
    original = scheduler.step

    @functools.wraps(original)
    def step(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        source.stepped(scheduler, timestep, output)
        return output

    own = vars(scheduler).get("step")
    scheduler.step = step
    try:
        yield
    finally:
        if own is None:
            del scheduler.step
        else:
            scheduler.step = own


def _check_encoder(model: Any, holders: list[Any]) -> None:
    for name, layer in model.named_modules():
        variants = getattr(layer, "lora_variant", None) if "encoder" in name.split(".") else None
        for adapter, variant in (variants or {}).items():
            if isinstance(variant, NaraVariant) and any(holder.depends_on_noise(adapter) for holder in holders):
                raise ValueError(
                    f"Adapter '{adapter}' adapts '{name}', which reads the text before the canvas once for all steps, "
                    "where there is no λ: adapt the decoder alone, by target_modules."
                )


_CALLS: dict[str, Callable[..., Any]] = {"LLaDA2Pipeline": _call_llada2, "DiffusionGemmaPipeline": _call_gemma}


# ---------------------------------------------------------------------- methods


def set_adapters(self: Any, adapter_names: str | list[str], adapter_weights: Any = None) -> None:
    """Activate adapters of the model, at strengths: numbers or StrengthSchedules, one for all or one each; None is 1.

    A number multiplies the schedule that an adapter has; a schedule replaces it.

    Raises:
        ValueError: there is no such adapter, or another number of weights.
    """
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    _check_names(self.model, names)
    weights = adapter_weights if isinstance(adapter_weights, list) else [adapter_weights] * len(names)
    if len(weights) != len(names):
        raise ValueError(f"adapter_weights has {len(weights)} values for {len(names)} adapters: pass one each.")
    for name, weight in zip(names, weights, strict=True):
        set_strength(self.model, name, 1.0 if weight is None else weight)
    for layer in tuner_layers(self.model):
        layer.set_adapter(names)


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
