"""A pen that draws in an object's own coordinates: x to the right, y down, the object within [-1, 1] × [-1, 1]."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

OUTLINE = 0.5  # brightness of an outline beside its area's
LINE = 0.05  # width of an outline, in the object's units


def darker(colour: Colour, factor: float = OUTLINE) -> Colour:
    return tuple(min(255, round(value * factor)) for value in colour)


class Pen:
    """Shapes at ``centre``, scaled by ``radius`` (both in pixels of the canvas), mirrored left to right on request."""

    def __init__(self, draw: ImageDraw.ImageDraw, centre: Point, radius: float, mirrored: bool = False):
        self.draw, self.centre, self.radius = draw, centre, radius
        self.direction = -1 if mirrored else 1
        self.width = max(1, round(LINE * radius))

    def at(self, point: Point) -> Point:
        """A point of the object on the canvas."""
        x, y = point
        return self.centre[0] + self.direction * x * self.radius, self.centre[1] + y * self.radius

    def box(self, left: float, top: float, right: float, bottom: float) -> tuple[float, float, float, float]:
        (x0, y0), (x1, y1) = self.at((left, top)), self.at((right, bottom))
        return min(x0, x1), y0, max(x0, x1), y1

    def ellipse(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        self.draw.ellipse(self.box(left, top, right, bottom), colour, darker(colour), self.width)

    def rectangle(
        self, left: float, top: float, right: float, bottom: float, colour: Colour, rounded: float = 0.0
    ) -> None:
        box = self.box(left, top, right, bottom)
        self.draw.rounded_rectangle(box, rounded * self.radius, colour, darker(colour), self.width)

    def polygon(self, points: Sequence[Point], colour: Colour) -> None:
        self.draw.polygon([self.at(point) for point in points], colour, darker(colour), self.width)

    def line(self, points: Sequence[Point], colour: Colour, width: float) -> None:
        self.draw.line([self.at(point) for point in points], colour, max(1, round(width * self.radius)), joint="curve")

    def sector(self, box: tuple[float, float, float, float], start: float, end: float, colour: Colour) -> None:
        """The sector of the ellipse in ``box`` between two angles in degrees, clockwise from the right."""
        if self.direction < 0:
            start, end = 180 - end, 180 - start
        self.draw.pieslice(self.box(*box), start, end, colour, darker(colour), self.width)
