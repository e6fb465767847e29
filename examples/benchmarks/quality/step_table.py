"""A learned bias for each step of a few-step student, on some layers: λ by a table, without a core.

benchmark_few_steps.py compares it with cores. It isn't part of the package: no adapter file holds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nara_diffusion.training import loop


class StepTable(nn.Module):
    """A bias (K, features) for each linear layer with a name that ends as one of `endings`, zeros at first.

    Args:
        denoiser: the model that has the layers, before an adapter is injected.
        timesteps: those of the K steps, (K,).
    """

    def __init__(self, denoiser: nn.Module, endings: Sequence[str], timesteps: Tensor) -> None:
        super().__init__()
        self.timesteps = timesteps.float()
        self.names = [name for name, _ in denoiser.named_modules() if name.endswith(tuple(endings))]
        layers: list[Any] = [denoiser.get_submodule(name) for name in self.names]
        self.biases = nn.ParameterList([torch.zeros(len(timesteps), layer.out_features) for layer in layers])
        self.handles: list[RemovableHandle] = []

    def join(self, denoiser: nn.Module) -> None:
        """Add the biases in each forward of `denoiser`, to the layers as they then are, with or without an adapter."""
        denoiser.register_forward_pre_hook(self._start, with_kwargs=True)
        denoiser.register_forward_hook(self._end, always_call=True)

    def _start(self, denoiser: nn.Module, _: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        steps = (kwargs["timestep"].float()[:, None] - self.timesteps).abs().argmin(1)
        for name, bias in zip(self.names, self.biases, strict=True):
            layer = denoiser.get_submodule(name)
            self.handles.append(layer.register_forward_hook(partial(_plus, bias[steps])))

    def _end(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    @contextmanager
    def trained(self, rate: float) -> Iterator[None]:
        """Inside, optimizers have a group for the biases, with their own learning rate."""
        build = loop.build_optimizer

        def built(*args: Any, **options: Any) -> torch.optim.Optimizer:
            optimizer = build(*args, **options)
            optimizer.add_param_group({"name": "step table", "params": list(self.biases), "lr": rate})
            return optimizer

        with patch.object(loop, "build_optimizer", built):
            yield


def _plus(bias: Tensor, _: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
    return output + bias
