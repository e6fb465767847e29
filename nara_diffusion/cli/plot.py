"""Plot of an adapter's core over λ.

    nara plot my-toy                            # writes my-toy.png
    nara plot my-toy --output core.png --points 201

Left: the distance of C(λ) from the identity, ‖C(λ) − I‖ / ‖I‖; 0 is a plain LoRA. Middle: the singular values of C(λ),
which show the directions that are amplified or switched off at each λ. Right: the strength over λ. If layers have cores
of their own, lines are the mean over the cores, and the shaded range is from the least to the largest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nara_diffusion.loaders.file import AdapterPart
from nara_diffusion.noise.signals import NoiseSignals
from nara_diffusion.utils.atomic_write import atomic_write

from .adapter_file import AdapterFile, cores_of, read, strength_of
from .errors import in_one_line


def core_curves(part: AdapterPart, levels: Tensor) -> tuple[Tensor, Tensor]:
    """(‖C − I‖ / ‖I‖ (g, n), singular values of C (g, n, r)) of the g cores at λ (n,).

    Raises:
        ValueError: the core reads the mask density too, so it is no function of λ alone.
    """
    cores = cores_of(part)
    if cores.needs_density:
        raise ValueError("the core reads the mask density beside λ, so it can't be drawn over λ alone.")
    with torch.no_grad():
        signals = NoiseSignals(levels, None)
        matrices = [cores.matrix(group, signals).expand(len(levels), -1, -1).double() for group in cores.groups]
    distances = [
        (C - torch.eye(C.shape[-1], dtype=C.dtype)).flatten(1).norm(dim=1) / C.shape[-1] ** 0.5 for C in matrices
    ]
    rank = max(C.shape[-1] for C in matrices)
    values = [
        torch.nn.functional.pad(torch.linalg.svdvals(C), (0, rank - C.shape[-1]), value=torch.nan) for C in matrices
    ]
    return torch.stack(distances), torch.stack(values)


def draw(file: AdapterFile, path: Path, points: int) -> None:
    """Write the plot to the PNG file `path`, with a row for each component. Creates its folder.

    Raises:
        ValueError: see `core_curves`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    levels = torch.linspace(0, 1, points, dtype=torch.float32)
    curves = {name: core_curves(part, levels) for name, part in file.parts.items()}
    figure = Figure(figsize=(12, 3.4 * len(curves)), layout="constrained")
    FigureCanvasAgg(figure)
    for row, (name, (distances, values)) in zip(
        figure.subplots(len(curves), 3, squeeze=False), curves.items(), strict=True
    ):
        config = file.parts[name].config
        _band(row[0], levels, distances, f"{name}: {config.core_type}", "‖C(λ) − I‖ / ‖I‖")
        for index in range(values.shape[-1]):
            row[1].plot(levels, values[..., index].nanmean(0), linewidth=1)
        row[1].set(xlabel="noise level λ", ylabel="singular values of C(λ)", xlim=(0, 1))
        strength = strength_of(config, levels)
        row[2].plot(levels, strength)
        lowest = min(0.0, strength.min().item())
        row[2].set(xlabel="noise level λ", ylabel="strength", xlim=(0, 1), ylim=(lowest, None))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def _band(axes: Any, levels: Tensor, values: Tensor, title: str, label: str) -> None:
    axes.plot(levels, values.mean(0))
    if len(values) > 1:
        axes.fill_between(levels, values.amin(0), values.amax(0), alpha=0.2)
    axes.set(xlabel="noise level λ", ylabel=label, title=title, xlim=(0, 1), ylim=(0, None))


def main(argv: Sequence[str] | None = None) -> None:
    """The command `nara plot`."""
    parser = argparse.ArgumentParser(
        "nara plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("file", metavar="FILE", help="the adapter: a file, or a folder")
    parser.add_argument("--output", type=Path, help="the PNG file (default: FILE's name with .png, in this folder)")
    parser.add_argument(
        "--points", type=int, default=101, help="number of λ, evenly from 0 to 1, at least 2 (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    with in_one_line():
        if args.points < 2:
            raise ValueError(f"--points is {args.points}, expected at least 2.")
        output = args.output or Path(f"{Path(args.file).resolve().stem}.png")
        if output.is_dir():
            raise ValueError(f"--output {output} is a folder: name a PNG file, such as {output / 'core.png'}.")
        draw(read(args.file), output, args.points)
        sys.stdout.write(f"{output}\n")
