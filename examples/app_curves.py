"""The picture of app.py: how far C(λ) is from the identity, and the strength, over λ."""

from __future__ import annotations

from collections.abc import Sequence

from app_adapters import LEVELS, Adapter, Points
from matplotlib.figure import Figure

from nara_diffusion import StrengthSchedule


def draw(adapters: Sequence[Adapter], points: Sequence[Points]) -> Figure:
    """A line for each adapter: left ‖C(λ) − I‖ / ‖I‖, right its strength with the points that make it."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (adapter, own) in enumerate(zip(adapters, points, strict=True), start=1):
        left.plot(LEVELS, adapter.distance, label=f"adapter {number}")
        (line,) = right.plot(LEVELS, StrengthSchedule(own).at(LEVELS), label=f"adapter {number}")
        right.plot(*zip(*own, strict=True), "o", color=line.get_color(), markersize=4, clip_on=False)
    left.set(title="core", ylabel="‖C(λ) − I‖ / ‖I‖")
    right.set(title="strength", ylabel="s(λ)")
    for axes in (left, right):
        lowest, highest = min(axes.get_ylim()[0], 0), max(axes.get_ylim()[1], 0.1)
        axes.set(xlabel="noise level λ (1 = pure noise)", xlim=(0, 1), ylim=(lowest, highest))
        if len(adapters) > 1:
            axes.legend()
    return figure
