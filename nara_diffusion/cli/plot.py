"""Plot of an adapter's core over λ.

    nara plot my-toy                            # writes my-toy.png
    nara plot my-toy --output core.png --points 201

Left: the distance of C(λ) from the identity, ‖C(λ) − I‖ / ‖I‖; 0 is a plain LoRA. Middle: the singular values of C(λ),
which show the directions that are amplified or switched off at each λ. Right: the strength over λ. If layers have cores
of their own, lines are the mean over the cores, and the shaded range is from the least to the largest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nara_diffusion.export.adapter_factors import cores_of, schedule_of
from nara_diffusion.loaders.file import AdapterFile, AdapterPart, naming
from nara_diffusion.utils.atomic_write import atomic_write


def core_curves(part: AdapterPart, levels: Tensor) -> tuple[Tensor, Tensor]:
    """(‖C − I‖ / ‖I‖ (g, n), singular values of C (g, n, r)) of the g cores at λ (n,)."""
    cores = cores_of(part)
    with torch.no_grad():
        matrices = [cores.matrix(group, levels).expand(len(levels), -1, -1).double() for group in cores]
    rank = max(C.shape[-1] for C in matrices)
    distances = [(C - torch.eye(C.shape[-1])).flatten(1).norm(dim=1) / C.shape[-1] ** 0.5 for C in matrices]
    values = [
        torch.nn.functional.pad(torch.linalg.svdvals(C), (0, rank - C.shape[-1]), value=torch.nan) for C in matrices
    ]
    return torch.stack(distances), torch.stack(values)


def draw(file: AdapterFile, path: Path, points: int) -> None:
    """Write the plot to the PNG file `path`, with a row for each component. Creates its folder."""
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
        schedule = schedule_of(config)
        strength = torch.ones_like(levels) if schedule is None else schedule.at(levels)
        row[0].plot(levels, distances.mean(0))
        row[0].fill_between(levels, distances.amin(0), distances.amax(0), alpha=0.2)
        row[0].set(ylabel="‖C(λ) − I‖ / ‖I‖", title=f"{name}: {config.core_type}", ylim=(0, None))
        row[1].plot(levels, values.nanmean(0), linewidth=1)
        row[1].set(ylabel="singular values of C(λ)")
        row[2].plot(levels, strength)
        row[2].set(ylabel="strength", ylim=(min(0.0, strength.min().item()), None))
        for axes in row:
            axes.set(xlabel="noise level λ", xlim=(0, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def run(args: Any) -> str:
    """The command `nara plot`."""
    output = args.output or Path(f"{Path(args.file).resolve().stem}.png")
    if args.points < 2 or output.is_dir():
        raise ValueError(f"--points is {args.points}, --output {output}: pass 2 or more, and the name of a PNG file.")
    with naming(args.file):
        draw(AdapterFile.read(Path(args.file)), output, args.points)
    return str(output)
