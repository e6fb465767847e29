"""Read weights that other libraries' hooks load or convert only while their own module runs.

                 hook               kind                    weights between forwards
    accelerate   `_hf_hook`         CPU and disk offload    on "meta"
    Diffusers    `_diffusers_hook`  group offloading        on the CPU, or on disk without values
                                    layerwise casting       in a storage dtype such as float8

Code that reads weights without calling their module must load them itself. The LoRA variants read
B, W0 and the magnitude in this way, and the root's hook calls the cores before Diffusers has loaded
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def is_managed(module: nn.Module) -> bool:
    """Return whether accelerate or Diffusers has hooked the forward of `module`."""
    return "_hf_hook" in vars(module) or "_diffusers_hook" in vars(module)


@contextmanager
def onloaded(*modules: nn.Module) -> Iterator[None]:
    """Keep all weights of `modules` on their compute device and in their compute dtype."""
    below = [child for module in modules for child in module.modules()]
    managed = [(module, hook) for module in below for hook in _hooks_of(module)]
    for module, hook in managed:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for module, hook in reversed(managed):
            hook.post_forward(module, torch.empty(0))


def groups_of(module: nn.Module) -> list[Any]:
    """Return the groups that Diffusers' group offloading loads for the forward of `module`."""
    return [hook.group for hook in _hooks_of(module) if hasattr(hook, "group")]


def onload_groups(module: nn.Module) -> None:
    """Load the weights for the forward of `module` if Diffusers offloads it in groups."""
    for group in groups_of(module):
        group.onload_()


@contextmanager
def in_memory(module: nn.Module) -> Iterator[None]:
    """Keep in memory the weights that the forward of `module` loads, even if they are on disk."""
    onload_groups(module)
    try:
        yield
    finally:
        for group in groups_of(module):
            group.offload_()


def is_offloaded(model: nn.Module) -> bool:
    """Return whether hooks move weights of `model` away between forwards, or keep copies of them."""
    return any(offloading_hooks(module) or groups_of(module) for module in model.modules())


def _hooks_of(module: nn.Module) -> list[Any]:
    """Return the hooks around the forward of `module`, starting with the outermost.

    The list includes all of Diffusers' hooks, even one that only counts calls.
    """
    registry = getattr(module, "_diffusers_hook", None)
    of_diffusers = [] if registry is None else list(reversed(registry.hooks.values()))
    return [*offloading_hooks(module), *of_diffusers]


def offloading_hooks(module: nn.Module) -> list[Any]:
    """Return accelerate's offloading hooks on `module`, also those inside a sequence of hooks."""
    hook = vars(module).get("_hf_hook")
    hooks = getattr(hook, "hooks", [hook])
    return [hook for hook in hooks if getattr(hook, "offload", False)]


def is_float8(dtype: torch.dtype) -> bool:
    """Return whether `dtype` is an 8-bit float, a possible storage dtype of layerwise casting."""
    return dtype.is_floating_point and dtype.itemsize == 1
