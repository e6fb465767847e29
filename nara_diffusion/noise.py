"""λ: its unit, and how a forward of an adapted model learns it.

λ is a float32 tensor (1,) or (b,) in [0, 1]; 1 is pure noise. It reaches a forward of an adapted model by

1. `with noise_level(model, value): …`, which beats
2. a source set once by `set_noise_source(model, source)`, asked at each forward.

Neither threads nor async tasks see each other's λ, and a thread started inside the context does not inherit it (it
raises instead, since it finds none). What does inherit it, such as an async task, loses it when the context is left. A
generator that yields inside the context, however it has entered it, does not lend its λ to its caller: it holds only
while the generator itself runs (unless it makes a context manager), in its own thread.

A part of the model that is called by itself, such as the encoder that `generate` of T5 and BART calls, has the λ of the
context it is called in; sources are asked by forwards of the whole model alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from .channel import CoreChannel, is_current
from .contexts import entered, innermost

MASKED_SHARE = "masked_share"
"""The name of λ's definition for masked language models: masked tokens of the answer over all of its tokens."""


class NoiseSignals(NamedTuple):
    """What a core may be told about the noise of a batch: λ (b,) or (1,), and the mask density, likewise, or None."""

    noise_level: Tensor
    mask_density: Tensor | None = None


class NoiseSource(Protocol):
    """Tells λ from a forward's own arguments. `convention` names λ's definition, e.g. "masked_share"."""

    convention: str

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoiseSignals: ...


class MixedBatch(NamedTuple):
    """PEFT's `adapter_names`: the adapter that serves each sample of a batch."""

    adapter_names: list[str]


Level = float | Tensor | np.ndarray | Sequence[float]
"""One number in [0, 1], or one a sample."""


def as_signal(value: Level, name: str = "noise_level") -> Tensor:
    """`value` as a float32 tensor (1,) or (b,), with the gradient of a tensor.

    Raises:
        ValueError: not a number or one-dimensional, or an element that is NaN or outside [0, 1].
    """
    try:
        signal = _as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"{name} is {value!r}: pass a number in [0, 1], or a tensor, array or list of them, one a sample."
        ) from None
    if signal.is_complex() or signal.dtype == torch.bool or signal.dim() > 1 or signal.numel() == 0:
        raise ValueError(
            f"{name} has shape {tuple(signal.shape)} and dtype {signal.dtype}: "
            "pass one number, or a tensor of shape (batch,)."
        )
    signal = signal.clone().float().reshape(-1)  # whoever writes to `value` later does not move λ
    _check_range(signal, name)
    return signal


@torch.compiler.disable(recursive=True)
def _check_range(signal: Tensor, name: str) -> None:
    values = torch.func.debug_unwrap(signal)  # transforms of torch.func let nobody look at what they map over
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(f"{name} is {values.tolist()}: every value has to lie in [0, 1], where 1 is pure noise.")


def is_differentiated(signal: Tensor) -> bool:
    """Whether somebody differentiates by what `signal` was made from, sample by sample."""
    return signal.requires_grad or torch.func.debug_unwrap(signal) is not signal


def _as_tensor(value: Any) -> Tensor:
    if isinstance(value, np.ndarray):
        value = np.ascontiguousarray(value)  # which torch wants
    elif isinstance(value, (list, tuple)) and any(isinstance(one, Tensor) for one in value):
        return torch.stack([torch.as_tensor(one) for one in value])  # with their gradients
    return torch.as_tensor(value)


def as_signals(noise_level: Level, mask_density: Level | None = None) -> NoiseSignals:
    """Both by `as_signal`, and of one length: a value shared by the batch is repeated beside one a sample.

    Raises:
        ValueError: see `as_signal`; or two different lengths.
    """
    level = as_signal(noise_level)
    if mask_density is None:
        return NoiseSignals(level)
    density = as_signal(mask_density, "mask_density").to(level.device)
    if len(level) != len(density) and 1 not in (len(level), len(density)):
        raise ValueError(
            f"mask_density has {len(density)} values, noise_level {len(level)}: pass one value, or one a sample."
        )
    return NoiseSignals(*torch.broadcast_tensors(level, density))


def noise_level(model: nn.Module, value: Level, *, mask_density: Level | None = None) -> AbstractContextManager[None]:
    """Inside the context, forwards of `model` and of its parts run at noise level λ = `value`; it beats any source.

    Contexts nest, and the previous value comes back on exit, after an exception too. Other threads and async tasks
    do not see it. (`value` is copied; if it is a tensor that requires a gradient, it gets one.)

    Args:
        model: an adapted model, wrapped (PeftModel, DDP, `torch.compile`) or not.
        value: λ in [0, 1], 1 = pure noise: a float, or a tensor, array or list (b,) with one value a sample, where the
            adapted layers see the batch first, (b, …): in a model that gives them (length, b, …), pass a float.
        mask_density: for `core_input` "mask_density" or "both": a float or (b,), in [0, 1].

    Raises:
        ValueError: `value` is not in [0, 1], NaN or misshapen, or `model` holds no NaRA adapter.
    """
    adapted = _adapted_parts(model)
    signals = as_signals(value, mask_density)
    for root, holder in adapted:
        holder.prepare_parts(root)
    return entered(frozenset(holder.channel for _, holder in adapted), signals)


def active_signals(channel: CoreChannel) -> NoiseSignals | None:
    """What `noise_level(…)` says for the model of `channel` here and now.

    Raises:
        ValueError: a backward pass that began inside the context recomputes a whole forward, whose λ may have been
            another.
    """
    entry = innermost(channel, NoiseSignals)
    if entry is None:
        return None
    if not is_current(entry.backward):
        raise ValueError(
            "A backward pass runs the whole adapted model again (a checkpoint function around it?), and the λ that is "
            "active now may not be that of the first run: enter `with noise_level(model, value):` inside the "
            "checkpointed function, or use the model's own `gradient_checkpointing_enable()`."
        )
    return entry.value


def active_adapter_names(channel: CoreChannel) -> list[str] | None:
    """The adapter of each sample, if PEFT's `adapter_names` says so here and now."""
    entry = innermost(channel, MixedBatch)
    return None if entry is None else entry.value.adapter_names


def find_holders(model: nn.Module) -> list[Any]:
    """The core holders below `model`."""
    return [holder for _, holder in _holders_by_root(model)]


def core_holders(model: nn.Module) -> list[Any]:
    """`find_holders`, where finding none is the caller's mistake."""
    return [holder for _, holder in _adapted_parts(model)]


def _adapted_parts(model: nn.Module) -> list[tuple[nn.Module, Any]]:
    if not isinstance(model, nn.Module):
        raise ValueError(f"{type(model).__name__} is no torch.nn.Module: pass the model itself, e.g. pipe.unet.")
    found = _holders_by_root(model)
    if not found:
        raise ValueError(
            f"{type(model).__name__} holds no NaRA adapter: add one first, e.g. get_peft_model(model, NaraConfig(…))."
        )
    return found


def _holders_by_root(model: nn.Module) -> list[tuple[nn.Module, Any]]:
    """(root, its holder of cores) of all that is adapted below `model`. A holder is told by its `is_core_holder`.

    Samplers ask at every step, so what cannot hold one, the inside of LoRA layers and of holders, is passed by: three
    quarters of the modules of an adapted LLaDA-8B.
    """
    found, seen, left = [], set(), [model]
    while left:
        module = left.pop()
        if id(module) in seen or "lora_A" in module._modules:
            continue
        seen.add(id(module))
        for child in module._modules.values():
            if getattr(type(child), "is_core_holder", False):
                found.append((module, child))
            elif child is not None:
                left.append(child)
    return found


def is_noise_aware(model: nn.Module) -> bool:
    """Whether an enabled, active adapter of `model` needs λ."""
    return any(holder.needs_noise for holder in find_holders(model))


def needs_mask_density(model: nn.Module) -> bool:
    """Whether an enabled, active adapter of `model` reads the mask density."""
    return mask_density_radius(model) is not None


def mask_density_radius(model: nn.Module) -> int | None:
    """The radius R, in tokens, of the mask density that the active adapters of `model` read, or None.

    Raises:
        ValueError: active adapters read densities of different radii.
    """
    radii = {radius for holder in find_holders(model) for radius in holder.density_radii}
    if len(radii) > 1:
        raise ValueError(
            f"Active adapters read mask densities of different radii, {sorted(radii)}: activate one at a time."
        )
    return radii.pop() if radii else None


def set_noise_source(model: nn.Module, source: NoiseSource | None) -> None:
    """Let `source` tell λ at each forward of `model` for which no `noise_level(…)` is active. None removes it.

    Raises:
        ValueError: `model` holds no NaRA adapter, or one was trained with another convention of λ.
    """
    holders = core_holders(model)
    for holder in holders:
        holder.check_source(source)
    for holder in holders:
        holder.set_source(source)
