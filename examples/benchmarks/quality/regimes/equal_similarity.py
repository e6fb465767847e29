"""One image: prompt fidelity at equal subject fidelity, level by level, also where some runs don't reach the plan's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nara_diffusion.utils.statistics import interval
from quality.regimes.images.one_image import LEVELS_OF_SIMILARITY, Look, alignment_at
from quality.report.markdown import NOTHING, change
from quality.report.markdown import table as markdown_table

LOWER_LEVELS = (0.36, 0.38)
"""Chosen after the runs of rank 16, as such that nearly all of them reach: they decide nothing."""

FEWEST = 5
"""Pairs of seeds of which a difference is shown."""


def table(looks: Mapping[tuple[str, int], Sequence[Look]], arms: Sequence[str]) -> str:
    """Of each arm and level: how many seeds reach it, and the best alignment there less LoRA's, over the seeds in which
    both do. `looks` are those of {(arm, seed)}."""
    levels = (*LOWER_LEVELS, *LEVELS_OF_SIMILARITY)
    header = ["alignment less LoRA (seeds), at a similarity of", *(f"{level:.2f}" for level in levels)]
    return markdown_table(header, [[arm, *(_cell(looks, arm, level) for level in levels)] for arm in arms])


def _cell(looks: Mapping[tuple[str, int], Sequence[Look]], arm: str, level: float) -> str:
    own, peer = _reached(looks, arm, level), _reached(looks, "lora", level)
    differences = [own[seed] - peer[seed] for seed in sorted(own.keys() & peer.keys())]
    shown = change(interval(differences), 3) if arm != "lora" and len(differences) >= FEWEST else NOTHING
    return f"{shown} ({len(own)})"


def _reached(looks: Mapping[tuple[str, int], Sequence[Look]], arm: str, level: float) -> dict[int, float]:
    """{seed: the best alignment} of the seeds that reach the level."""
    found = {seed: alignment_at(level, own) for (name, seed), own in looks.items() if name == arm}
    return {seed: value for seed, value in found.items() if value is not None}
