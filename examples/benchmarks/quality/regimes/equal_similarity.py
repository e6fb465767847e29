"""One image: prompt fidelity at equal subject fidelity, level by level, from the looks at a model in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nara_diffusion.utils.statistics import interval
from quality.report.markdown import NOTHING, change
from quality.report.markdown import table as markdown_table

Look = Mapping[str, float]
"""step, similarity, alignment."""
LEVELS = (0.36, 0.38, 0.44, 0.47, 0.5)
"""Of similarity. The first two were chosen after the runs of rank 16, as such that nearly all of them reach."""
FEWEST = 5
"""Pairs of seeds of which a difference is shown."""


def table(looks: Mapping[tuple[str, int], Sequence[Look]], arms: Sequence[str]) -> str:
    """Of each arm and level: how many seeds reach it, and the best alignment there less LoRA's, over the seeds in which
    both do. `looks` are those of {(arm, seed)}."""
    header = ["alignment less LoRA (seeds), at a similarity of", *(f"{level:.2f}" for level in LEVELS)]
    return markdown_table(header, [[arm, *(_cell(looks, arm, level) for level in LEVELS)] for arm in arms])


def _cell(looks: Mapping[tuple[str, int], Sequence[Look]], arm: str, level: float) -> str:
    own, peer = _reached(looks, arm, level), _reached(looks, "lora", level)
    differences = [own[seed] - peer[seed] for seed in sorted(own.keys() & peer.keys())]
    shown = change(interval(differences), 3) if arm != "lora" and len(differences) >= FEWEST else NOTHING
    return f"{shown} ({len(own)})"


def _reached(looks: Mapping[tuple[str, int], Sequence[Look]], arm: str, level: float) -> dict[int, float]:
    """{seed: the best alignment of a look whose similarity is `level` or more}, of the seeds that have one."""
    found = {}
    for (name, seed), own in looks.items():
        reached = [look["alignment"] for look in own if look["similarity"] >= level]
        if name == arm and reached:
            found[seed] = max(reached)
    return found
