"""The loss as a function of λ: means inside and outside the trained window, and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from torch import Tensor

from nara_diffusion.noise.drawn_levels import EVERYTHING, NoiseWindow
from nara_diffusion.utils.files import atomic_write


def validation_means(losses: Tensor, noise_levels: Tensor, window: NoiseWindow) -> dict[str, float]:
    """Return {"validation_loss": mean} of losses (b,) at λ (b,).

    With a window, also return "validation_loss_inside" and "validation_loss_outside", the means
    inside and outside the window.
    """
    parts = {"validation_loss": losses}
    if not window.is_everything:
        inside = window.contains(noise_levels)
        parts |= {
            "validation_loss_inside": losses[inside],
            "validation_loss_outside": losses[~inside],
        }
    return {name: part.double().mean().item() for name, part in parts.items() if len(part)}


def plot_noise_level_curves(
    path: Path,
    noise_levels: Sequence[float],
    base: Sequence[float],
    adapted: Sequence[float],
    title: str,
    unit: str,
    window: NoiseWindow = EVERYTHING,
) -> None:
    """Plot the losses over λ into a PNG file, as in Figure 1 of the paper.

    The left plot shows both losses. The right plot shows the adapter's gain, base − adapted.

    Args:
        noise_levels: λ of each point, in [0, 1].
        base, adapted: the loss of each model at each point, in `unit`.
        window: the trained window, which is shaded.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(noise_levels, base, marker="o", color="tab:gray", label="base model")
    left.plot(noise_levels, adapted, marker="o", color="tab:blue", label="with the adapter")
    left.set(
        xlabel="noise level λ (1 = pure noise)",
        ylabel=f"loss ({unit})",
        xlim=(0, 1.02),
        yscale="log",
    )
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter(LogFormatter())
    right.axhline(0, color="tab:gray", linewidth=1)
    gains = [loss - adapted_loss for loss, adapted_loss in zip(base, adapted, strict=True)]
    right.plot(noise_levels, gains, marker="o", color="tab:green")
    right.set(xlabel="noise level λ (1 = pure noise)", ylabel=f"gain ({unit})", xlim=(0, 1.02))
    right.set_title("base model − adapted model", fontsize="medium")
    for axes in () if window.is_everything else (left, right):
        axes.axvspan(window.low, window.high, color="tab:blue", alpha=0.1, label="trained")
    left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    figure.suptitle(title)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=120)
