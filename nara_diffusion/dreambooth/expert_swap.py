"""Of the two denoisers of Wan 2.2, only the one that runs has its frozen weights on the device.

    forward of a denoiser    free the copy of the other one, copy this one's weights, run

The weights of both stay on the host, so nothing is copied back. A copy stays until the other
denoiser runs, and so for the backward. Adapters, their gradients and the optimizer's states stay on
the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from .block_swap import SWAPS, Weights, empty, host_weights
from .families import Family


class ExpertSwap:
    """The weights of the denoisers of `pipe`, which are frozen, on the CPU and without adapters."""

    def __init__(self, pipe: DiffusionPipeline, family: Family, device: torch.device) -> None:
        self.device = device
        self.names: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
        self.weights: dict[str, Weights] = {}
        for name in family.denoisers:
            self.weights[name] = host_weights(getattr(pipe, name), device)
            empty(self.weights[name], device)
        self.present: str | None = None  # the denoiser on the device
        self.attach(pipe)

    def attach(self, pipe: DiffusionPipeline) -> None:
        """Swap the denoisers of a pipeline that has the weights of this object."""
        for name in self.weights:
            denoiser = getattr(pipe, name)
            self.names[denoiser], SWAPS[denoiser] = name, self
            denoiser.to(self.device)
            denoiser.register_forward_pre_hook(self.enter)

    def enter(self, denoiser: nn.Module, _: object) -> None:
        """Bring the weights of a denoiser to the device."""
        name = self.names[denoiser]
        if name == self.present:
            return
        self.leave()
        for parameter, host in self.weights[name]:
            parameter.data = host.to(self.device, non_blocking=True, copy=True)
        self.present = name

    def leave(self) -> None:
        """Free the copy on the device."""
        if self.present is not None:
            empty(self.weights[self.present], self.device)
        self.present = None

    @contextmanager
    def whole(self, denoiser: nn.Module) -> Iterator[None]:
        """Keep all of `denoiser` on the CPU inside the context, since both can't be on the device."""
        self.leave()
        weights = self.weights[self.names[denoiser]]
        for parameter, host in weights:
            parameter.data = host
        denoiser.to("cpu")
        try:
            yield
        finally:
            empty(weights, self.device)
            denoiser.to(self.device)
