"""λ: its unit, and how a forward of an adapted model learns it.

λ is a float32 tensor (1,) or (b,) in [0, 1]; 1 is pure noise. It reaches a forward of an adapted model by

1. `with noise_level(model, value): …`, which beats
2. a source set once by `set_noise_source(model, source)`, asked at each forward.

Threads and async tasks do not see each other's λ. A thread that is started inside the context does not inherit it: its
forwards raise. An async task does inherit it, until the context ends. In a generator that enters the context and
yields, the context is active only while the generator itself runs, in its own thread; its caller does not see it. (The
exception is a generator that implements a context manager.)

A part of the model that is called by itself, such as the encoder in `generate` of T5 and BART, has the λ of the context
around the call. Only forwards of the whole model call a source.
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
    """Inside the context, forwards of `model` and of its parts run at noise level λ = `value`, whatever its source.

    Contexts nest. The previous value is restored on exit, also after an exception. Other threads and async tasks do not
    see it. (`value` is copied; a tensor that requires a gradient receives one.)

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
    """The signals of the active `noise_level(…)` for the model of `channel`; None if there is none.

    Raises:
        ValueError: a backward pass recomputes a whole forward, which may have had another λ.
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
    """The adapter of each sample by PEFT's `adapter_names`; None if it is not in use."""
    entry = innermost(channel, MixedBatch)
    return None if entry is None else entry.value.adapter_names
