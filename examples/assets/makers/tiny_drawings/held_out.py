"""Pictures of each subject that no training sees: what a fine-tuned sdxl-tiny should be able to draw.

In other poses before other walls, whose caption is the instance prompt, and in each of the ten places of the data,
whose caption names it. `../../benchmarks/quality/images/held_out.py` measures a loss on them.
"""

from __future__ import annotations

from collections.abc import Iterable

from make_subject import held_out_pose, picture, picture_in_place
from PIL import Image

from .places import PLACES
from .subjects import Subject


def in_poses(subject: Subject, numbers: Iterable[int]) -> list[tuple[str, Image.Image]]:
    """(caption, picture) before a wall, one a number."""
    return [(subject.instance_prompt, picture(held_out_pose(number), subject=subject)) for number in numbers]


def in_places(subject: Subject, numbers: Iterable[int]) -> list[tuple[str, Image.Image]]:
    """(caption, picture) in each of the ten places, one a number."""
    return [
        (f"{subject.instance_prompt} {place}", picture_in_place(place, number, subject=subject))
        for number in numbers
        for place in PLACES
    ]
