"""Pass D(λ) from the root of an adapted model to its layers."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from nara_diffusion.noise.context import Entry, present
from nara_diffusion.noise.parts import Parts
from nara_diffusion.noise.rows import ModelRows

from .adapted_layer import AdaptedLayer

Key = tuple[str, str]
"""(adapter, group of layers that share a core)"""


class CoreSource(Protocol):
    """The part of the core holder's interface that the channel and the variants use.

    Attributes:
        schedules: the strength over λ of each adapter that has one, by name.
    """

    @property
    def schedules(self) -> Mapping[str, object]: ...

    def core_of_part(self, key: Key) -> tuple[Tensor, Parts | None]:
        """Return D (n, r, r) outside any forward of the root, and the parts for its rows, if any."""
        ...

    def core_to_merge(self, key: Key, layer: AdaptedLayer) -> tuple[Tensor, Tensor | None]:
        """Return D (1, r, r) for a layer that is being merged, and its λ (1,) if D depends on λ."""
        ...

    def check_merged(self, merged: Tensor) -> None:
        """Raise ValueError if the context's λ differs from the λ of merged layers."""


@dataclass(frozen=True)
class Pushed:
    """The values of D that one forward has pushed.

    Attributes:
        present: the innermost context at the time of the push.
        entry: the innermost context for this model; None if λ came from a source.
        deviations: D (n, r, r), float32, by key.
        parts: the parts of a sample, if the rows of D belong to parts; otherwise None.
        operands: copies of D in other dtypes, made when a layer requests them.
    """

    present: Entry | None
    entry: Entry | None
    deviations: Mapping[Key, Tensor]
    parts: Parts | None = None
    operands: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)


class CoreChannel:
    """Pass D(λ) from the root of an adapted model to its layers, in one thread for one forward.

    Before each forward of the root, the core holder pushes D(λ) into a `threading.local`; a forward
    hook removes it. (A compiled graph can read a `threading.local` but not a `ContextVar`, and a
    forward does not switch to another async task.)

    A layer accepts a pushed D only inside the same `noise_level(…)` as the push. If Ctrl-C ends a
    forward, the hook does not run, but the old D is still never used at another λ. (If λ came from
    a timestep, there is no context to compare. A *part* of the model that is called directly then
    reads the old D until the next forward of the whole model.)

    Args:
        holder: the core holder.
        rows: the description of how the model's layers see its batch.

    Attributes:
        local: thread-local storage with the attribute `pushed`, a `Pushed` or None.
    """

    def __init__(self, holder: CoreSource, rows: ModelRows) -> None:
        self.holder = holder
        self.rows = rows
        self.local = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, local=threading.local())

    def read(self, key: Key) -> tuple[Tensor, Parts | None]:
        """Return D (1 or b, r, r), float32, for a layer, or D of parts together with the parts.

        D belongs to the current forward, or to the context around a part that is called directly.
        """
        pushed = self.pushed()
        if (
            pushed is not None
            and key in pushed.deviations
            and (torch.compiler.is_compiling() or pushed.present is present.get())
        ):
            return pushed.deviations[key], pushed.parts
        return self.holder.core_of_part(key)

    def operand(self, key: Key, deviation: Tensor, like: Tensor) -> Tensor:
        """Return D in the dtype and on the device of `like`, without gradient.

        D is converted once per forward. If the adapter has a strength, D stays in float32, because
        it may be nearly −I, and after rounding, C = I + D would not be close enough to zero.
        While gradients are off, one D for all rows in float32 or float64 becomes Cᵀ (r, r), which
        layers multiply by in one operation.
        """
        dtype, device = like.dtype, like.device
        if key[0] in self.holder.schedules:
            dtype = torch.promote_types(dtype, torch.float32)
        is_core = not torch.is_grad_enabled() and deviation.shape[0] == 1 and dtype.itemsize >= 4
        if deviation.dtype == dtype and deviation.device == device and not is_core:
            return deviation.detach()
        pushed = self.pushed()
        name = (key, dtype, device, is_core, torch.is_inference_mode_enabled())
        operands = {}
        if pushed is not None and pushed.deviations.get(key) is deviation:
            operands = pushed.operands
        if name not in operands:
            operand = deviation.detach().to(device, dtype)
            if is_core:
                operand = operand[0].T + torch.eye(operand.shape[-1], dtype=dtype, device=device)
            operands[name] = operand
        return operands[name]

    def pushed(self) -> Pushed | None:
        """Return the values that the current forward has pushed, or None outside a forward."""
        return getattr(self.local, "pushed", None)

    @contextmanager
    def using(self, deviations: Mapping[Key, Tensor], parts: Parts | None) -> Iterator[None]:
        """Give D to the layers inside the context, and restore the previous values on exit."""
        former = self.pushed()
        innermost = None if torch.compiler.is_compiling() else present.get()
        entry = None if former is None else former.entry
        self.local.pushed = Pushed(innermost, entry, deviations, parts)
        try:
            yield
        finally:
            self.local.pushed = former
