"""Compute D(λ) of all planned levels at once, for a loop of forwards without gradients.

A sampler that knows the λ of its steps opens `CoreHolder.planning(levels)` around them. The first
forward with one of these levels computes D for all of them, and each forward takes its rows:

    D (n, r, r) at the n planned levels → D (b or 1, r, r) of a forward with λ (b,)

A forward with any other λ, with gradients, or with λ on another device than the CPU (which the host
would have to wait for) computes its own D.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from nara_diffusion.layers.channel import Key


class PlannedLevels:
    """The planned levels of one loop, with their D.

    Args:
        levels: λ (n,), on the CPU.
    """

    def __init__(self, levels: Tensor) -> None:
        self.levels = levels
        self._row_of = {level: row for row, level in enumerate(levels.tolist())}
        self._sources: Sequence[tuple[str, nn.Module, object]] = ()
        self._tensors: list[Tensor] = []
        self._versions: list[int] = []
        self._deviations: Mapping[Key, Tensor] = {}

    def deviations(
        self,
        level: Tensor,
        sources: Sequence[tuple[str, nn.Module, object]],
        compute: Callable[[Tensor], Mapping[Key, Tensor]],
    ) -> dict[Key, Tensor] | None:
        """Return D (b or 1, r, r) by key for λ (b,), or None if a level was not planned.

        Args:
            sources: the adapters that D belongs to: name, cores, strength. If they change, or the
                cores' tensors in place (`.data` hides it), D is computed again.
            compute: returns D (n or 1, r, r) by key for λ (n,).
        """
        if torch.is_grad_enabled() or level.device.type != "cpu":
            return None
        rows = [self._row_of.get(value, -1) for value in level.tolist()]
        if -1 in rows:
            return None
        versions = [tensor._version for tensor in self._tensors]
        if sources != self._sources or versions != self._versions:
            self._deviations, self._sources = compute(self.levels), sources
            tensors = [(*core.parameters(), *core.buffers()) for _, core, _ in sources]
            self._tensors = [tensor for tensor in chain(*tensors) if not tensor.is_inference()]
            self._versions = [tensor._version for tensor in self._tensors]
        chosen = slice(rows[0], rows[0] + 1) if len(set(rows)) == 1 else rows
        return {key: D if len(D) == 1 else D[chosen] for key, D in self._deviations.items()}
