"""The subjects of DreamBooth: four things that sdxl-tiny's data has the kind of, but not this one.

Each is drawn with a Pen; ``pose`` from 0 to 1 moves one part of it (arms, a flag, a lid), so that no two pictures show
quite the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from .objects import COLOURS, CREAM, TYRE
from .pen import Pen, darker


@dataclass(frozen=True)
class Subject:
    """Attributes:
    kind: of which thing of the data it is one.
    draw: the artist.
    colours: that every picture of it shows.
    """

    kind: str
    draw: Callable[[Pen, float], None]
    colours: tuple[str, ...]

    @property
    def instance_prompt(self) -> str:
        return f"a photo of sks {self.kind}"


def toy(pen: Pen, pose: float) -> None:
    """A striped cone with one eye, a ball on its tip, two feet and two arms, which go up."""
    purple, yellow, red, orange = (COLOURS[name] for name in ("purple", "yellow", "red", "orange"))
    for side in (-1, 1):
        pen.ellipse(side * 0.38 - 0.24, 0.74, side * 0.38 + 0.24, 1, orange)
        pen.line([(side * 0.42, 0.3), (side * 0.9, 0.65 - 0.8 * pose)], darker(purple, 0.8), 0.16)
    pen.polygon([(0, -0.85), (0.66, 0.88), (-0.66, 0.88)], purple)
    for top, bottom in ((0.16, 0.38), (0.6, 0.82)):
        left, right = 0.38 * (top + 0.85), 0.38 * (bottom + 0.85)  # the cone's half width at both edges of the stripe
        pen.polygon([(-left, top), (left, top), (right, bottom), (-right, bottom)], yellow)
    pen.ellipse(-0.27, -0.42, 0.27, 0.12, (255, 255, 255))
    pen.ellipse(-0.06, -0.26, 0.18, -0.02, (20, 20, 20))
    pen.ellipse(-0.19, -1, 0.19, -0.64, red)


def car(pen: Pen, pose: float) -> None:
    """A green egg on a large and a small wheel, with white dots, and a flag that goes up behind."""
    green, white, orange, red = (COLOURS[name] for name in ("green", "white", "orange", "red"))
    height = -0.55 - 0.42 * pose
    pen.line([(-0.62, 0.2), (-0.72, height)], TYRE, 0.08)
    pen.polygon([(-0.72, height), (-0.25, height + 0.16), (-0.68, height + 0.34)], red)
    pen.ellipse(-0.85, -0.5, 0.95, 0.72, green)
    for x, y, radius in ((-0.1, -0.24, 0.13), (0.3, 0.32, 0.13), (0.66, 0.12, 0.12), (-0.62, -0.02, 0.12)):
        pen.ellipse(x - radius, y - radius, x + radius, y + radius, white)
    pen.ellipse(0.22, -0.36, 0.62, 0.02, (60, 60, 110))
    for x, radius in ((-0.42, 0.46), (0.66, 0.26)):
        pen.ellipse(x - radius, 1 - 2 * radius, x + radius, 1, TYRE)
        inner = 0.62 * radius
        pen.ellipse(x - inner, 1 - radius - inner, x + inner, 1 - radius + inner, orange)


def cup(pen: Pen, pose: float) -> None:
    """A yellow goblet with two handles, a zigzag, and a lid with a knob, which lifts."""
    yellow, blue, red, green = (COLOURS[name] for name in ("yellow", "blue", "red", "green"))
    for side in (-1, 1):
        pen.ellipse(side * 0.68 - 0.28, -0.45, side * 0.68 + 0.28, 0.2, green)
        pen.ellipse(side * 0.68 - 0.14, -0.3, side * 0.68 + 0.14, 0.05, CREAM)
    pen.polygon([(-0.5, 1), (0.5, 1), (0.12, 0.7), (0.12, 0.4), (-0.12, 0.4), (-0.12, 0.7)], darker(yellow, 0.85))
    pen.polygon([(-0.68, -0.5), (0.68, -0.5), (0.3, 0.5), (-0.3, 0.5)], yellow)
    zigzag = [(-0.56, -0.3), (-0.34, 0.12), (-0.12, -0.3), (0.12, 0.12), (0.34, -0.3), (0.5, 0.05)]
    pen.line(zigzag, blue, 0.17)
    lift = -0.22 * pose
    pen.sector((-0.7, -0.95 + lift, 0.7, -0.05 + lift), 180, 360, blue)
    pen.ellipse(-0.16, -1 + lift, 0.16, -0.74 + lift, red)


def house(pen: Pen, pose: float) -> None:
    """A round blue tower under an orange dome, with a ladder of windows and a sail wheel, which turns."""
    blue, orange, white, purple = (COLOURS[name] for name in ("blue", "orange", "white", "purple"))
    pen.polygon([(-0.42, -0.35), (0.42, -0.35), (0.62, 1), (-0.62, 1)], blue)
    pen.sector((-0.52, -0.9, 0.52, 0.2), 180, 360, orange)
    pen.polygon([(-0.22, 1), (-0.22, 0.66), (0, 0.5), (0.22, 0.66), (0.22, 1)], purple)
    for y in (0.08, 0.3):
        for x in (-0.26, 0.26):
            pen.ellipse(x - 0.12, y - 0.1, x + 0.12, y + 0.1, white)
    for sail in range(4):
        angle = math.pi * (sail / 2 + pose / 2)
        tip = (0.6 * math.cos(angle), -0.38 + 0.6 * math.sin(angle))
        pen.line([(0, -0.38), tip], white, 0.17)
    pen.ellipse(-0.14, -0.52, 0.14, -0.24, purple)


SUBJECTS: dict[str, Subject] = {
    "toy": Subject("toy", toy, ("purple", "yellow", "red")),
    "car": Subject("car", car, ("green", "orange")),
    "cup": Subject("cup", cup, ("yellow", "blue", "red")),
    "house": Subject("house", house, ("blue", "orange", "purple")),
}
