"""Losses by noise level, written to metrics.jsonl, the progress bar and the trackers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from nara_diffusion.noise.window import NoiseWindow
from nara_diffusion.training.output.output_dir import write_text

from .base_hold import SplitLosses

# thirds of [0, 1]: an adapter's gain depends on λ, so one mean over all λ hides it
NOISE_BINS = {"loss_low": (0.0, 1 / 3), "loss_mid": (1 / 3, 2 / 3), "loss_high": (2 / 3, 1.0)}


class LossWindow:
    """Collects per-sample losses and their λ until `means`, which starts the next window."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._parts: list[Tensor] = []  # (k, 3): loss or distance, λ, whether it is a distance
        self._is_split = False

    def add(self, losses: Tensor, noise_levels: Tensor, split: SplitLosses | None = None) -> None:
        """Add losses (b,) at λ (b,); with `split`, also the losses inside and the distances outside of the window."""
        self._losses.append(losses)
        self._is_split = split is not None
        if split is None:
            split = SplitLosses(losses, noise_levels, torch.zeros_like(losses, dtype=torch.bool))
        self._parts.append(stacked(split))

    def means(self) -> dict[str, float]:
        """{"loss", "loss_low", "loss_mid", "loss_high"}: means of all, and of each third of λ that isn't empty.

        Where the base is held outside of a window, the thirds are of what lies inside, and "loss_inside" and
        "distance_outside" are beside them.
        """
        losses, (values, levels, held) = torch.cat(self._losses), torch.cat(self._parts).unbind(1)
        self._losses, self._parts = [], []
        chosen = {"loss_inside": held == 0, "distance_outside": held == 1} if self._is_split else {}
        for name, (low, high) in NOISE_BINS.items():
            chosen[name] = (held == 0) & (levels >= low) & ((levels < high) | (high == 1.0))
        means = {name: values[rows].mean().item() for name, rows in chosen.items() if rows.any()}
        return {"loss": losses.mean().item(), **means}


def window_means(losses: Tensor, noise_levels: Tensor, window: NoiseWindow) -> dict[str, float]:
    """{"loss_inside", "loss_outside"}: means of losses (b,) at λ (b,) inside of `window` and outside of it."""
    if window.is_everything:
        return {}
    inside = window.contains(noise_levels)
    parts = {"loss_inside": losses[inside], "loss_outside": losses[~inside]}
    return {name: part.mean().item() for name, part in parts.items() if len(part)}


def validation_means(losses: Tensor, noise_levels: Tensor, window: NoiseWindow) -> dict[str, float]:
    """{"validation_loss", "validation_loss_low", …} of losses (b,) at λ (b,), as `LossWindow` and `window_means`."""
    collected = LossWindow()
    collected.add(losses, noise_levels)
    means = collected.means() | window_means(losses, noise_levels, window)
    return {f"validation_{name}": value for name, value in means.items()}


def before_and_after(before: Any, after: Any, names: Sequence[str]) -> dict[str, Any]:
    """{"NAME_before", "NAME_after", …, "noise_levels"} of two measurements, for results.json."""
    sides = {"before": before, "after": after}
    values = {f"{name}_{side}": getattr(of, name) for name in names for side, of in sides.items()}
    return {**values, "noise_levels": after.noise_levels}


def stacked(split: SplitLosses) -> Tensor:
    """(k, 3) float32."""
    return torch.stack([part.detach().float() for part in (split.values, split.noise_level, split.held)], dim=1)


class MetricLog:
    """Appends {"step": …, …} lines to metrics.jsonl, and hands them to the trackers, from the main process."""

    def __init__(self, accelerator: Accelerator, folder: Path, first_step: int):
        self.accelerator = accelerator
        self.path = folder / "metrics.jsonl"
        if accelerator.is_main_process and self.path.exists():
            _forget_after(self.path, first_step)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Log `values` of optimizer step `step`."""
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        self.accelerator.log(values, step=step)


def _forget_after(path: Path, step: int) -> None:
    """Delete the lines of steps that a resumed run takes again, and a line that a killed run left half-written."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    write_text(path, "".join(line for line in lines if _step_of(line) <= step))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return math.inf
