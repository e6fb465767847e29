"""Losses by noise level, and their way to metrics.jsonl, the progress bar and the trackers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from nara_diffusion.training.output import write_text

# thirds of [0, 1]: an adapter's gain depends on λ, so one mean over all λ hides it
NOISE_BINS = {"loss_low": (0.0, 1 / 3), "loss_mid": (1 / 3, 2 / 3), "loss_high": (2 / 3, 1.0)}


class LossWindow:
    """Collects per-sample losses and their λ until `means`, which starts the next window."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._levels: list[Tensor] = []

    def add(self, losses: Tensor, noise_levels: Tensor) -> None:
        """Takes losses (b,) and λ (b,)."""
        self._losses.append(losses)
        self._levels.append(noise_levels)

    def means(self) -> dict[str, float]:
        """{"loss", "loss_low", "loss_mid", "loss_high"}: means of all, and of each third of λ that isn't empty."""
        losses, levels = torch.cat(self._losses), torch.cat(self._levels)
        self._losses, self._levels = [], []
        values = {"loss": losses.mean().item()}
        for name, (low, high) in NOISE_BINS.items():
            inside = (levels >= low) & ((levels < high) | (high == 1.0))
            if inside.any():
                values[name] = losses[inside].mean().item()
        return values


class MetricLog:
    """Appends {"step": …, …} lines to metrics.jsonl, and hands them to the trackers, from the main process."""

    def __init__(self, accelerator: Accelerator, folder: Path, first_step: int):
        self.accelerator = accelerator
        self.path = folder / "metrics.jsonl"
        if accelerator.is_main_process and self.path.exists():
            _forget_after(self.path, first_step)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Logs `values` of optimizer step `step`."""
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        self.accelerator.log(values, step=step)


def _forget_after(path: Path, step: int) -> None:
    """Drops the lines of steps that a resumed run will take again, and one that a killed run left half-written."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    write_text(path, "".join(line for line in lines if _step_of(line) <= step))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return math.inf
