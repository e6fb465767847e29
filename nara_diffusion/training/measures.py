"""Losses by noise level: their means, metrics.jsonl and the trackers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from nara_diffusion.noise.strength_schedule import NoiseWindow
from nara_diffusion.utils.atomic_write import atomic_write

# all, and thirds of [0, 1]: an adapter's gain depends on λ, so one mean over all λ hides it
NOISE_BINS = {"loss": (0.0, 1.0), "loss_low": (0.0, 1 / 3), "loss_mid": (1 / 3, 2 / 3), "loss_high": (2 / 3, 1.0)}


class LossWindow:
    """Sums of per-sample losses, of all and of each third of λ, until `means`, which starts the next window.

    Args:
        sums: {name: [sum, number]} of a window that goes on.
    """

    def __init__(self, sums: Mapping[str, Any] | None = None) -> None:
        self.sums: dict[str, Any] = dict(sums or {})

    def add(self, losses: Tensor, noise_levels: Tensor) -> None:
        """Add losses (b,) at λ (b,)."""
        losses, levels = losses.double().cpu(), noise_levels.cpu()
        for name, (low, high) in NOISE_BINS.items():
            rows = (levels >= low) & ((levels < high) | (high == 1.0))
            total, number = self.sums.get(name, (0.0, 0))
            self.sums[name] = [total + losses[rows].sum().item(), number + int(rows.sum())]

    def means(self) -> dict[str, float]:
        """{"loss", "loss_low", "loss_mid", "loss_high"}: means of all, and of each third of λ that isn't empty."""
        sums, self.sums = self.sums, {}
        return {name: total / number for name, (total, number) in sums.items() if number}


def validation_means(losses: Tensor, noise_levels: Tensor, window: NoiseWindow) -> dict[str, float]:
    """{"validation_loss", "validation_loss_low", …} of losses (b,) at λ (b,); with a window also the means inside and
    outside of it, "validation_loss_inside" and "validation_loss_outside"."""
    collected = LossWindow()
    collected.add(losses, noise_levels)
    means = collected.means()
    if not window.is_everything:
        inside = window.contains(noise_levels)
        parts = {"loss_inside": losses[inside], "loss_outside": losses[~inside]}
        means |= {name: part.mean().item() for name, part in parts.items() if len(part)}
    return {f"validation_{name}": value for name, value in means.items()}


def before_and_after(before: Any, after: Any, names: Sequence[str]) -> dict[str, Any]:
    """{"NAME_before", "NAME_after", …, "noise_levels"} of two measurements, for results.json."""
    sides = {"before": before, "after": after}
    values = {f"{name}_{side}": getattr(of, name) for name in names for side, of in sides.items()}
    return {**values, "noise_levels": after.noise_levels}


class MetricLog:
    """Appends {"step": …, …} lines to metrics.jsonl, and hands them to the trackers, from the main process.

    Lines of steps after `first_step`, which a resumed run takes again, go, and one that a killed run left half-written.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, first_step: int):
        self.accelerator = accelerator
        self.path = folder / "metrics.jsonl"
        if accelerator.is_main_process and self.path.exists():
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= first_step]
            with atomic_write(self.path) as partial:
                partial.write_text("".join(kept), encoding="utf-8")

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Log `values` of optimizer step `step`."""
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        self.accelerator.log(values, step=step)
