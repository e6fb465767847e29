"""An exponential moving average (EMA) of the trained weights, by Diffusers' EMAModel.

After optimizer step n, with w the weights and w̄ their average, in float32,

    w̄ ← d w̄ + (1 − d) w,    d = min(decay, n / (n + 9)), and 0 for n = 1

so that a short training is averaged over about its last tenth, whatever the decay. Training never sees w̄.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn

AVERAGE = "ema.safetensors"
_STEPS = "optimizer_steps"


class WeightAverage:
    """The average of the parameters of `model` that are trained now.

    Args:
        model: its weights have to be on their final device.
        decay: in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._ema = EMAModel(self._trained.values(), decay=decay, foreach=True)

    def update(self) -> None:
        """Update the average after an optimizer step."""
        self._ema.step(self._trained.values())

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the context, the model has the averaged weights; afterwards its own ones, bit for bit."""
        self._ema.store(self._trained.values())
        try:
            self._ema.copy_to(self._trained.values())
            yield
        finally:
            self._ema.restore(self._trained.values())

    def save(self, folder: Path) -> None:
        """Write ema.safetensors: the average by the names of the parameters, and how many steps it has seen."""
        tensors = {name: value.cpu().contiguous() for name, value in self._named().items()}
        save_file({**tensors, _STEPS: torch.tensor(self._ema.optimization_step)}, folder / AVERAGE)

    def load(self, folder: Path) -> None:
        """Load what `save` wrote.

        Raises:
            ValueError: the file is missing, or of other parameters.
        """
        path = folder / AVERAGE
        if not path.is_file():
            raise ValueError(f"{folder} has no {AVERAGE}, in which a run with use_ema keeps its average.")
        tensors = load_file(path)
        steps = tensors.pop(_STEPS, None)
        own = {name: value.shape for name, value in self._named().items()}
        if steps is None or {name: value.shape for name, value in tensors.items()} != own:
            raise ValueError(
                f"{path} holds the average of {len(tensors)} tensors, which aren't the {len(own)} trained ones of this "
                "run: was it written with another adapter, rank or target_modules?"
            )
        self._ema.optimization_step = int(steps)
        for name, value in self._named().items():
            value.copy_(tensors[name])

    def _named(self) -> dict[str, torch.Tensor]:
        return dict(zip(self._trained, self._ema.shadow_params, strict=True))
