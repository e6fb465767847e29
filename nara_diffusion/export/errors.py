"""The error of exported LoRAs over λ: as numbers, as JSON and as a plot."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
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
    """

    noise_levels: list[float]
    weights: list[float]
    update: list[float]

    @property
    def worst_update(self) -> float:
        """The largest of `update`."""
        return max(self.update)

    @property
    def mean_update(self) -> float:
        """The root mean square of `update`, weighted by `weights`."""
        return math.sqrt(sum(weight * error**2 for weight, error in zip(self.weights, self.update, strict=True)))

    def save(self, directory: Path) -> None:
        """Write export_error.json, and export_error.png where matplotlib is installed."""
        content = asdict(self) | {"worst_update": self.worst_update, "mean_update": self.mean_update}
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
        axes.plot(self.noise_levels, self.update, color="tab:blue")
        axes.set(xlabel="noise level λ (1 = pure noise)", ylabel="error of ΔW, relative to its size", xlim=(0, 1))
        axes.set_ylim(bottom=0)
        with atomic_write(path) as partial:
            figure.savefig(partial, dpi=120)
