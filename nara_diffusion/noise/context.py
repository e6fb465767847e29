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

from contextlib import AbstractContextManager
from typing import NamedTuple

from torch import nn

from nara_diffusion.runtime.channel import CoreChannel, is_current
from nara_diffusion.runtime.context_stack import entered, innermost
from nara_diffusion.runtime.modules import adapted_parts

from .signals import Level, NoiseSignals, as_signals


class MixedBatch(NamedTuple):
    """PEFT's `adapter_names`: the adapter of each sample of a batch."""

    adapter_names: list[str]


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
    adapted = adapted_parts(model)
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
