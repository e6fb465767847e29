"""Which models of a run are on its device: the denoiser, and others only while they are needed.

    before training    each text encoder in turn; their embeddings are kept in the cache
    training           the denoiser, of two the one that runs (`swaps`); beside it the
                       autoencoder, for latents that aren't cached yet
    sampling           text encoders in turn, the denoiser, beside it the autoencoder

A pipeline for samples shares its weights with the trained one, so both have the same rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from .families import Family
from .pipelines import modules_of


class Visit(ModelHook):
    """Bring a model to the device before its forward, after other models have left."""

    def __init__(self, execution_device: torch.device, leaving: Sequence[nn.Module]) -> None:
        self.execution_device = execution_device
        self.leaving = leaving

    def pre_forward(self, module: nn.Module, *args: object, **kwargs: object) -> tuple[Any, Any]:
        for other in self.leaving:
            move(other, torch.device("cpu"))
        move(module, self.execution_device)
        return args, kwargs


def take_turns(
    pipe: Any, family: Family, device: torch.device, staying: Sequence[str], is_tight: bool
) -> None:
    """Let the models of `pipe` visit `device` in turn; the denoiser comes at its first forward.

    On a CPU, everything stays where it is.

    Args:
        staying: models that never leave, such as trained text encoders.
        is_tight: whether the denoiser leaves while a text encoder runs.
    """
    if device == torch.device("cpu"):
        return
    models = modules_of(pipe)
    denoisers = [models.pop(name) for name in family.denoisers]
    for name in staying:
        models.pop(name).to(device)
    vae = models.pop("vae")
    encoders = list(models.values())
    for model in (*encoders, vae):
        move(model, torch.device("cpu"))
        leaving = [encoder for encoder in encoders if encoder is not model]
        if model is not vae:
            leaving += [vae, *denoisers] if is_tight and family.boundary is None else [vae]
        add_hook_to_module(model, Visit(device, leaving))
    hook = Visit(device, [*encoders, vae])
    for denoiser in denoisers:
        denoiser.register_forward_pre_hook(partial(_before_denoiser, hook))
    # the pipeline looks for its device at a model that has a hook
    pipe._exclude_from_cpu_offload = [*family.denoisers, *staying]


def _before_denoiser(hook: Visit, denoiser: nn.Module, _: object) -> None:
    hook.pre_forward(denoiser)


def move(model: nn.Module, device: torch.device) -> None:
    """Move a model, if it isn't there already."""
    if next(model.parameters()).device == device:
        return
    model.to(device)
    for layer in model.modules():  # bitsandbytes leaves 8-bit weights there after a forward
        state: Any = vars(layer).get("state")
        if getattr(state, "CB", None) is not None:
            state.CB, state.SCB = state.CB.to(device), state.SCB.to(device)


def device_of(model: nn.Module) -> torch.device:
    """Return the device that a model computes on."""
    hook = vars(model).get("_hf_hook")
    return getattr(hook, "execution_device", None) or next(model.parameters()).device
