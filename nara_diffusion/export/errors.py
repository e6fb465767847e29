"""The error of exported LoRAs, relative to the NaRA, over λ: as numbers, as JSON and as a plot."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nara_diffusion.utils.atomic_write import atomic_write

logger = logging.getLogger(__name__)
ERROR_FILE = "export_error.json"
PICTURE = "export_error.png"


@dataclass(frozen=True)
class ExportError:
    """Errors at several noise levels, relative to the size of the update.

    Attributes:
        noise_levels: λ (n,).
        weights: how often each λ occurs (n,); they sum to 1.
        update: ‖ΔW_exported(λ) − ΔW(λ)‖_F over all layers (n,), divided by the root mean square of ‖ΔW‖_F over λ.
        output_levels: λ (m,) at which outputs were compared on the user's batch; empty without a batch.
        output: ‖y_exported − y‖ at those λ (m,), divided by the root mean square of ‖y − y_base‖ over them.
    """

    noise_levels: list[float]
    weights: list[float]
    update: list[float]
    output_levels: list[float]
    output: list[float]

    @property
    def worst_update(self) -> float:
        """The largest of `update`."""
        return max(self.update)

    @property
    def mean_update(self) -> float:
        """The root mean square of `update`, weighted by `weights`."""
        return math.sqrt(sum(weight * error**2 for weight, error in zip(self.weights, self.update, strict=True)))

    @property
    def worst_output(self) -> float | None:
        """The largest of `output`; None if no outputs were compared."""
        return max(self.output, default=None)

    def save(self, directory: Path) -> None:
        """Write export_error.json, and export_error.png where matplotlib is installed."""
        content = asdict(self) | {
            "worst_update": self.worst_update,
            "mean_update": self.mean_update,
            "worst_output": self.worst_output,
        }
        with atomic_write(directory / ERROR_FILE) as partial:
            partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if importlib.util.find_spec("matplotlib") is None:
            logger.info("matplotlib is not installed, so %s is not drawn", PICTURE)
        else:
            self.plot(directory / PICTURE)

    def plot(self, path: Path) -> None:
        """Write a PNG of the errors over λ. Needs matplotlib, which the extra [train] installs."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        axes.plot(self.noise_levels, self.update, color="tab:blue", label="ΔW, all layers")
        if self.output:
            axes.plot(self.output_levels, self.output, marker="o", color="tab:green", label="outputs on the batch")
        axes.set(xlabel="noise level λ (1 = pure noise)", ylabel="error, relative to the update's size", xlim=(0, 1))
        axes.set_ylim(bottom=0)
        axes.legend()
        with atomic_write(path) as partial:
            figure.savefig(partial, dpi=120)


def relative(errors: Sequence[float], sizes: Sequence[float], weights: Sequence[float]) -> list[float]:
    """`errors` divided by the weighted root mean square of `sizes`; 0 if all sizes are 0."""
    unit = math.sqrt(sum(weight * size**2 for weight, size in zip(weights, sizes, strict=True)))
    return [error / unit if unit else 0.0 for error in errors]
