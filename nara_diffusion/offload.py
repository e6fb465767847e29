"""Weights that accelerate keeps elsewhere (CPU or disk offload) and brings in only for a module's own `forward`.

The forward rules read B, W0 and the magnitude without calling their modules, so they bring them in themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_offloaded(*weights: Tensor) -> bool:
    """Whether one of `weights` is elsewhere now."""
    return any(weight.is_meta for weight in weights)


@contextmanager
def onloaded(module: nn.Module) -> Iterator[None]:
    """Inside, the offloaded weights of `module` and of all modules below it are where they compute."""
    hooked = [(below, below._hf_hook) for below in module.modules() if _offloads(getattr(below, "_hf_hook", None))]
    for below, hook in hooked:
        hook.pre_forward(below)  # type: ignore[union-attr, operator]
    try:
        yield
    finally:
        for below, hook in hooked:
            hook.post_forward(below, torch.empty(0))  # type: ignore[union-attr, operator]


def _offloads(hook: Any) -> bool:
    return bool(getattr(hook, "offload", False))
