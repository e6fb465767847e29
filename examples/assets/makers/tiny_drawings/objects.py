"""What stands in the scenes: twelve kinds of things, each of a main and an accent colour, drawn with a Pen."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from .pen import Colour, Pen, darker

COLOURS: dict[str, Colour] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 220, 50),
    "green": (50, 170, 70),
    "blue": (45, 90, 220),
    "purple": (150, 60, 190),
    "white": (245, 245, 245),
    "black": (45, 45, 50),
}
BROWN, CREAM, GLASS, TYRE = (125, 80, 45), (245, 232, 205), (175, 220, 245), (40, 40, 45)


def ball(pen: Pen, main: Colour, accent: Colour, rng: random.Random) -> None:
    pen.ellipse(-0.85, -0.7, 0.85, 1, main)
    for start in (20, 140, 260):
        pen.sector((-0.85, -0.7, 0.85, 1), start, start + 45, accent)


def car(pen: Pen, main: Colour, accent: Colour, rng: random.Random) -> None:
    pen.polygon([(-0.6, 0.1), (-0.4, -0.4), (0.3, -0.4), (0.6, 0.1)], main)
    pen.polygon([(-0.48, 0.08), (-0.34, -0.3), (-0.08, -0.3), (-0.08, 0.08)], GLASS)
    pen.polygon([(0.02, 0.08), (0.02, -0.3), (0.24, -0.3), (0.46, 0.08)], GLASS)
    pen.rectangle(-1, 0.05, 1, 0.72, main, rounded=0.18)
    pen.rectangle(-0.98, 0.3, 0.98, 0.48, accent)
    for x in (-0.55, 0.55):
        pen.ellipse(x - 0.3, 0.4, x + 0.3, 1, TYRE)
        pen.ellipse(x - 0.12, 0.58, x + 0.12, 0.82, (200, 200, 200))


def house(pen: Pen, main: Colour, accent: Colour, rng: random.Random) -> None:
    pen.rectangle(-0.75, -0.15, 0.75, 1, main)
    pen.polygon([(-1, -0.1), (0, -1), (1, -0.1)], accent)
    pen.rectangle(-0.5, 0.3, -0.05, 1, BROWN)
    pen.rectangle(0.18, 0.1, 0.55, 0.5, GLASS)


def tree(pen: Pen, main: Colour, accent: Colour, rng: random.Random) -> None:
    pen.rectangle(-0.16, 0.1, 0.16, 1, BROWN)
    for x, y in ((-0.38, 0), (0.38, 0), (0, -0.42)):
        pen.ellipse(x - 0.48, y - 0.48, x + 0.48, y + 0.48, main)
    for x, y in ((-0.45, 0.1), (0.4, 0.05), (0, -0.5), (0.02, -0.05)):
        pen.ellipse(x - 0.13, y - 0.13, x + 0.13, y + 0.13, accent)


def fish(pen: Pen, main: Colour, accent: Colour, rng: random.Random) -> None:
    pen.polygon([(-0.5, 0.1), (-1, -0.45), (-1, 0.65)], accent)
    pen.polygon([(-0.2, -0.3), (0.1, -0.75), (0.35, -0.3)], accent)
    pen.ellipse(-0.7, -0.45, 1, 0.65, main)
    pen.ellipse(0.5, -0.2, 0.76, 0.06, (255, 255, 255))
    pen.ellipse(0.58, -0.12, 0.7, 0, (20, 20, 20))


def star(pen: Pen, main: Colour, accent: Colour, rng: random.Random) -> None:
    for size, colour in ((1.0, main), (0.5, accent)):
        radii = [size * (1 if corner % 2 == 0 else 0.45) for corner in range(10)]
        angles = [math.pi * (corner / 5 - 0.5) for corner in range(10)]
        pen.polygon([(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)], colour)


def boat(pen: Pen, main: Colour, accent: Colour, rng: random.Random) -> None:
    pen.line([(0, 0.5), (0, -1)], BROWN, 0.1)
    pen.polygon([(0.08, -0.95), (0.08, 0.3), (0.85, 0.3)], accent)
    pen.polygon([(-0.08, -0.7), (-0.08, 0.3), (-0.6, 0.3)], accent)
    pen.polygon([(-1, 0.45), (1, 0.45), (0.65, 1), (-0.65, 1)], main)


def cup(pen: Pen, main: Colour, accent: Colour, rng: random.Random) -> None:
    pen.ellipse(0.2, -0.3, 1, 0.65, main)
    pen.ellipse(0.4, -0.1, 0.8, 0.45, accent)
    pen.polygon([(-0.8, -0.6), (0.6, -0.6), (0.45, 1), (-0.65, 1)], main)
    pen.polygon([(-0.77, -0.1), (0.57, -0.1), (0.53, 0.4), (-0.72, 0.4)], accent)


def mushroom(pen: Pen, main: Colour, accent: Colour, rng: random.Random) -> None:
    pen.rectangle(-0.3, 0, 0.3, 1, CREAM, rounded=0.15)
    pen.sector((-1, -0.8, 1, 1.1), 180, 360, main)
    for x, y, r in ((-0.5, -0.12, 0.16), (0.1, -0.45, 0.18), (0.55, -0.08, 0.14), (-0.05, -0.02, 0.12)):
        pen.ellipse(x - r, y - r, x + r, y + r, accent)


def flower(pen: Pen, main: Colour, accent: Colour, rng: random.Random) -> None:
    pen.line([(0, -0.2), (0, 1)], (60, 130, 50), 0.12)
    pen.ellipse(0.02, 0.45, 0.6, 0.75, (60, 150, 60))
    for petal in range(6):
        x, y = 0.42 * math.cos(petal * math.pi / 3), -0.35 + 0.42 * math.sin(petal * math.pi / 3)
        pen.ellipse(x - 0.28, y - 0.28, x + 0.28, y + 0.28, main)
    pen.ellipse(-0.27, -0.62, 0.27, -0.08, accent)


def balloon(pen: Pen, main: Colour, accent: Colour, rng: random.Random) -> None:
    for x in (-0.22, 0.22):
        pen.line([(x * 2, 0.2), (x, 0.75)], (90, 70, 50), 0.06)
    pen.ellipse(-0.8, -1, 0.8, 0.5, main)
    pen.ellipse(-0.3, -1, 0.3, 0.5, accent)
    pen.rectangle(-0.25, 0.68, 0.25, 1, BROWN)


def toy(pen: Pen, main: Colour, accent: Colour, rng: random.Random) -> None:
    """A toy robot: round, square or egg-shaped, with two eyes, feet, arms up or down, and antennae, ears or neither."""
    shape, ears, arms = rng.choice(("round", "square", "egg")), rng.choice(("antennae", "round", "none")), rng.random()
    for side in (-1, 1):
        pen.rectangle(side * 0.28 - 0.16, 0.7, side * 0.28 + 0.16, 1, darker(main, 0.8), rounded=0.08)
        pen.line([(side * 0.45, 0.25), (side * 0.85, 0.6 - 0.75 * arms)], darker(main, 0.8), 0.16)
        if ears == "antennae":
            pen.line([(side * 0.15, -0.6), (side * 0.3, -0.95)], TYRE, 0.07)
            pen.ellipse(side * 0.3 - 0.09, -1, side * 0.3 + 0.09, -0.82, accent)
        elif ears == "round":
            pen.ellipse(side * 0.38 - 0.2, -0.9, side * 0.38 + 0.2, -0.5, main)
    if shape == "square":
        pen.rectangle(-0.55, 0, 0.55, 0.8, main, rounded=0.08)
        pen.rectangle(-0.45, -0.7, 0.45, 0.02, main, rounded=0.08)
    elif shape == "round":
        pen.ellipse(-0.6, -0.1, 0.6, 0.85, main)
        pen.ellipse(-0.48, -0.75, 0.48, 0.1, main)
    else:
        pen.ellipse(-0.58, -0.75, 0.58, 0.85, main)
    pen.ellipse(-0.3, 0.15, 0.3, 0.7, accent)
    for side in (-1, 1):
        pen.ellipse(side * 0.2 - 0.14, -0.5, side * 0.2 + 0.14, -0.2, (255, 255, 255))
        pen.ellipse(side * 0.2 - 0.06, -0.42, side * 0.2 + 0.06, -0.28, (20, 20, 20))


Artist = Callable[[Pen, Colour, Colour, random.Random], None]
KINDS: dict[str, Artist] = {
    artist.__name__: artist
    for artist in (ball, car, house, tree, fish, star, boat, cup, mushroom, flower, balloon, toy)
}
FLOATING = ("balloon", "star")  # these hang in the air; everything else stands on the ground
USUAL_ACCENT = {  # the second colour where the caption names only the first
    "ball": "white",
    "car": "black",
    "house": "red",
    "tree": "red",
    "fish": "orange",
    "star": "white",
    "boat": "white",
    "cup": "white",
    "mushroom": "white",
    "flower": "yellow",
    "balloon": "yellow",
    "toy": "white",
}
