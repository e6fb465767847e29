"""How C(λ) travels from the root of an adapted model to its layers, in forward, recomputation and compiled graphs.

Before each forward of the root, its holder of cores pushes C(λ) into a `threading.local`, and a forward hook takes it
away. (Unlike a `ContextVar`, a `threading.local` can be read inside a compiled graph; and a forward does not switch to
another async task.) A layer accepts what was pushed only while the `noise_level(…)` around it is the one of the push.
So a forward that Ctrl-C has ended, after which no hook runs, leaves no C to another λ. (Where λ came from a timestep
there is no context to compare: after Ctrl-C, a *part* of the model that is called by itself would read the old C, until
the next forward of the whole model.)
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nara_diffusion.noise.level import Entry, present

Key = tuple[str, str]
"""(adapter, group of layers that share a core)"""


class CoreChannel:
    """Hands C(λ) from one adapted model's root to its layers, for the thread and time of one forward.

    Args:
        holder: of the cores. It makes C for a layer outside of any forward of the root (`core_alone`) and for merging
            (`core_to_merge`), and compares λ with that of merged layers (`check_merged`).
        sample_major: whether a layer may see b · k rows, k consecutive ones a sample, where the root sees b.
        one_level: whether layers see something else than samples first, so that a batch must share its λ.

    Attributes:
        local: its attribute `pushed` is (present, entry, cores): the innermost context at the push, that for this
            model, and key → C.
    """

    def __init__(self, holder: Any, sample_major: bool = False, one_level: bool = False) -> None:
        self.holder = holder
        self.sample_major = sample_major
        self.one_level = one_level
        self.local = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, local=threading.local())

    def read(self, key: Key) -> Tensor:
        """C (b or 1, r, r), float32, for a layer: of the running forward, or of the context around a part alone."""
        pushed = getattr(self.local, "pushed", None)
        if pushed is not None and (torch.compiler.is_compiling() or pushed[0] is present.get()):
            core = pushed[2].get(key)
            if core is not None:
                return core
        return self.holder.core_alone(key)

    def push(self, entry: Entry | None, cores: Mapping[Key, Tensor]) -> None:
        """Give `cores` to the layers. `entry`: the context that told λ, if one did."""
        self.local.pushed = (None if torch.compiler.is_compiling() else present.get(), entry, cores)

    def pushed(self) -> tuple[Entry | None, Entry | None, Mapping[Key, Tensor]] | None:
        """What the running forward has pushed; None if none runs."""
        return getattr(self.local, "pushed", None)

    @contextmanager
    def using(self, cores: Mapping[Key, Tensor]) -> Iterator[None]:
        """Give `cores` to the layers inside the context, and what was there before afterwards."""
        before = self.pushed()
        self.push(None if before is None else before[1], cores)
        try:
            yield
        finally:
            self.local.pushed = before
