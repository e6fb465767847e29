"""Weights that hooks load, or convert to the compute dtype, only for the `forward` of their own module.

    accelerate     `_hf_hook`          CPU and disk offload: elsewhere, the weights are on "meta"
    Diffusers      `_diffusers_hook`   group offloading: elsewhere, they are on the CPU, or left without values on disk;
                                       layerwise casting: elsewhere, they are in a storage dtype such as float8

Code that reads weights without calling their module has to bring them in itself: the LoRA variants, which read B, W0
and the magnitude, and the root's hook, which calls the cores before Diffusers has loaded them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def is_managed(module: nn.Module) -> bool:
    """Whether accelerate or Diffusers have put a hook around the forward of `module` itself."""
    return "_hf_hook" in vars(module) or "_diffusers_hook" in vars(module)


@contextmanager
def onloaded(*modules: nn.Module) -> Iterator[None]:
    """Inside the context, all weights of `modules` are on the device, and in the dtype, in which they compute."""
    managed = [
        (below, hook)
        for module in modules
        for below in module.modules()
        for hook in _hooks_of(below)
    ]
    for module, hook in managed:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for module, hook in reversed(managed):
            hook.post_forward(module, torch.empty(0))


def groups_of(module: nn.Module) -> list[Any]:
    """The groups of Diffusers' group offloading that the forward of `module` itself loads."""
    return [hook.group for hook in _hooks_of(module) if hasattr(hook, "group")]


@contextmanager
def in_memory(module: nn.Module) -> Iterator[None]:
    """Inside the context, the weights that the forward of `module` itself loads are in memory, though they may be kept
    on disk."""
    groups = groups_of(module)
    for group in groups:
        group.onload_()
    try:
        yield
    finally:
        for group in groups:
            group.offload_()


def is_offloaded(model: nn.Module) -> bool:
    """Whether weights at or below `model` are elsewhere between forwards, or kept as copies."""
    return any(_accelerates(module) or groups_of(module) for module in model.modules())


def is_dispatched_by_layers(model: nn.Module) -> bool:
    """Whether accelerate offloads the layers of `model` one by one."""
    return any(_accelerates(module) for module in model.modules())


def _hooks_of(module: nn.Module) -> list[Any]:
    """The hooks around the forward of `module`, the outermost first: all of Diffusers', one of which counts calls."""
    registry = getattr(module, "_diffusers_hook", None)
    theirs = [] if registry is None else list(reversed(registry.hooks.values()))
    return [*_accelerates(module), *theirs]


def _accelerates(module: nn.Module) -> list[Any]:
    """accelerate's offloading hooks of `module`, whose hook may be a sequence of hooks."""
    hook = vars(module).get("_hf_hook")
    return [part for part in getattr(hook, "hooks", [hook]) if getattr(part, "offload", False)]
