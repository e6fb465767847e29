"""What a check leaves: a table on the screen, check.json with all numbers, check.png."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nara_diffusion.check.comparison import BinComparison
from nara_diffusion.check.measurement import BINS, Findings
from nara_diffusion.check.verdict import Verdict
from nara_diffusion.training.output import write_json
from nara_diffusion.training.report import format_table
from nara_diffusion.whole import whole_file

_HEADER = ("layers", "number", "R² of λ: median", "lowest", "highest", "lost share", "conflict ratio")


def write_report(folder: Path, findings: Findings, verdict: Verdict, about: Mapping[str, Any]) -> dict[str, Any]:
    """Writes check.json, which is returned, and check.png; `about` says what was measured, and how."""
    content = {**verdict.as_dict(), **about, **_numbers(findings)}
    write_json(folder / "check.json", content)
    draw(folder / "check.png", findings, verdict)
    return content


def summary(findings: Findings, verdict: Verdict) -> str:
    """The table, a row a kind of layer, and the verdict."""
    rows = [_row(kind, findings, names) for kind, names in layer_kinds(findings).items()]
    rows.append(_row("all", findings, list(findings.layers_before)))
    fit = f"loss {findings.loss_before:.4g} before the fit of a static LoRA, {findings.loss_after:.4g} after it"
    return f"{format_table(_HEADER, rows)}\n\n{fit}\n{verdict.answer}: {verdict.reason}"


def layer_kinds(findings: Findings) -> dict[str, list[str]]:
    """{kind: names of its layers}; the kind is what follows the last number of a block: attn1.to_q, mlp.up_proj."""
    kinds: dict[str, list[str]] = {}
    for name in findings.layers_before:
        kinds.setdefault(re.sub(r"^.*\.\d+\.(?=.*\D)", "", name), []).append(name)
    return kinds


def _row(kind: str, findings: Findings, names: list[str]) -> list[str]:
    told = sorted(findings.r_squared[name] for name in names)
    energy = _sum(findings.layers_before, names, "energy")
    shares = [_sum(findings.layers_before, names, "conflict"), _sum(findings.layers_after, names, "conflict")]
    ratios = [f"{share / energy:.3f}" if energy > 0 else "none" for share in shares]
    return [kind, str(len(names)), *(f"{value:.2f}" for value in (median(told), told[0], told[-1])), *ratios]


def _sum(layers: Mapping[str, BinComparison], names: list[str], what: str) -> float:
    return sum(getattr(layers[name], what) for name in names if name in layers)


def _numbers(findings: Findings) -> dict[str, Any]:
    return {
        "conflict_ratio": _number(findings.conflict_ratio),
        "lost_share": _number(findings.before.lost_share),
        "loss": {"before": findings.loss_before, "after": findings.loss_after},
        "noise_levels": [[k / BINS, (k + 1) / BINS] for k in findings.before.bins],
        "before": _gradients(findings.before),
        "after": _gradients(findings.after),
        "layers": {
            name: {
                "r_squared": _number(findings.r_squared[name]),
                "lost_share": _number(before.lost_share),
                "energy_before": before.energy,
                "conflict_after": findings.layers_after[name].conflict if name in findings.layers_after else None,
            }
            for name, before in findings.layers_before.items()
        },
    }


def _gradients(side: BinComparison) -> dict[str, Any]:
    return {
        "energy": side.products.diagonal().tolist(),
        "common_energy": side.common,
        "conflict": side.conflict,
        "reliability": side.reliability,
        "cosine": side.cosines,
    }


def _number(value: float) -> float | None:
    """JSON has no nan."""
    return None if math.isnan(value) else value


def draw(path: Path, findings: Findings, verdict: Verdict) -> None:
    """R² over the depth, and the cosines between bins before and after the fit."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    told, *matrices = figure.subplots(1, 3)
    order = list(findings.r_squared)
    for kind, names in layer_kinds(findings).items():
        told.plot([order.index(name) for name in names], [findings.r_squared[name] for name in names], ".", label=kind)
    told.set(xlabel="adapted layer, first to last", ylabel="R² of λ from one token's input", ylim=(-0.15, 1.02))
    if len(layer_kinds(findings)) <= 12:
        told.legend(fontsize="x-small")
    for axes, side, when in zip(matrices, (findings.before, findings.after), ("before", "after"), strict=True):
        cosines = [[math.nan if value is None else value for value in row] for row in side.cosines]
        image = axes.imshow(cosines, vmin=-1, vmax=1, cmap="RdBu", origin="lower")
        labels = [f"{(k + 0.5) / BINS:.1f}" for k in side.bins]
        axes.set(xticks=range(len(labels)), xticklabels=labels, yticks=range(len(labels)), yticklabels=labels)
        axes.set(xlabel="λ", ylabel="λ", title=f"cosine of gradients {when} the fit")
    figure.colorbar(image, ax=matrices)  # type: ignore[possibly-undefined]
    figure.suptitle(f"{verdict.answer}: conflict ratio {findings.conflict_ratio:.3g}")
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=110)
