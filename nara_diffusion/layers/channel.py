"""How D(λ) = C(λ) − I gets from the root of an adapted model to its layers: `CoreChannel`."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from nara_diffusion.noise.level import Entry, present
from nara_diffusion.noise.parts import Parts
from nara_diffusion.noise.rows import ModelRows

from .adapted_layer import AdaptedLayer

Key = tuple[str, str]
"""(adapter, group of layers that share a core)"""


class CoreSource(Protocol):
    """What the channel and the variants need from the holder of the cores."""

    def core_of_part(self, key: Key) -> tuple[Tensor, Parts | None]:
        """Return D (n, r, r), and the parts of its rows, outside any forward of the root."""
        ...

    def core_to_merge(self, key: Key, layer: AdaptedLayer) -> tuple[Tensor, Tensor | None]:
        """Return D (1, r, r) for a layer that is being merged, and its λ (1,) if D depends on λ."""
        ...

    def check_merged(self, merged: Tensor) -> None:
        """Raise ValueError if λ of the context is not λ of merged layers."""
        ...

    def has_strength(self, name: str) -> bool:
        """Return whether the strength of an adapter depends on λ."""
        ...


@dataclass(frozen=True)
class Pushed:
    """What one forward has pushed.

    Attributes:
        present: the innermost context at the push.
        entry: the innermost context for this model; None if a source gave λ.
        deviations: key → D (n, r, r), float32.
        parts: the parts of a sample that the rows of D belong to, if they do.
        operands: copies of D in other dtypes, made when a layer asks for them.
    """

    present: Entry | None
    entry: Entry | None
    deviations: Mapping[Key, Tensor]
    parts: Parts | None = None
    operands: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)


class CoreChannel:
    """Pass D(λ) from the root of an adapted model to its layers, in one thread for one forward.

    Before each forward of the root, the holder of the cores pushes D(λ) into a `threading.local`; a
    forward hook removes it. (A compiled graph can read a `threading.local` but not a `ContextVar`,
    and a forward does not switch to another async task.)

    A layer accepts a pushed D only inside the same `noise_level(…)` as the push. No hook runs after
    a forward that Ctrl-C has ended, but its D is not used at another λ. (If λ came from a timestep,
    there is no context to compare. After Ctrl-C, a *part* of the model that is called by itself
    then reads the old D, until the next forward of the whole model.)

    Args:
        holder: the holder of the cores.
        rows: how the model's layers see its batch.

    Attributes:
        local: its attribute `pushed` is a `Pushed`, or None.
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
        """Return D (1 or b, r, r), float32, or D of parts and these parts, for a layer.

        It is D of the running forward, or of the context around a part that is called by itself.
        """
        pushed = self.pushed()
        is_current = pushed is not None and (
            torch.compiler.is_compiling() or pushed.present is present.get()
        )
        if pushed is not None and is_current:
            deviation = pushed.deviations.get(key)
            if deviation is not None:
                return deviation, pushed.parts
        return self.holder.core_of_part(key)

    def operand(self, key: Key, deviation: Tensor, like: Tensor) -> Tensor:
        """Return D in the dtype and on the device of `like`, without gradient.

        It is converted once a forward. If the adapter has a strength, D may be nearly −I, and
        rounding it would leave much of what should vanish, so D stays in float32.
        """
        dtype, device = like.dtype, like.device
        if self.holder.has_strength(key[0]):
            dtype = torch.promote_types(dtype, torch.float32)
        if deviation.dtype == dtype and deviation.device == device:
            return deviation.detach()
        pushed = self.pushed()
        if pushed is None or pushed.deviations.get(key) is not deviation:
            return deviation.detach().to(device, dtype)
        name = (key, dtype, device, torch.is_inference_mode_enabled())
        if name not in pushed.operands:
            pushed.operands[name] = deviation.detach().to(device, dtype)
        return pushed.operands[name]

    def push(
        self, entry: Entry | None, deviations: Mapping[Key, Tensor], parts: Parts | None = None
    ) -> None:
        """Give D to the layers. `entry` is the context that gave λ; None for a source."""
        innermost = None if torch.compiler.is_compiling() else present.get()
        self.local.pushed = Pushed(innermost, entry, deviations, parts)

    def pushed(self) -> Pushed | None:
        """Return what the running forward has pushed; None if none runs."""
        return getattr(self.local, "pushed", None)

    @contextmanager
    def using(self, deviations: Mapping[Key, Tensor], parts: Parts | None) -> Iterator[None]:
        """Give D to the layers inside the context, and the previous ones afterwards."""
        before = self.pushed()
        self.push(None if before is None else before.entry, deviations, parts)
        try:
            yield
        finally:
            self.local.pushed = before
