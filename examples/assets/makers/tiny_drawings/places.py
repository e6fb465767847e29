"""Where the things stand: ten places, painted on a square canvas whose side is ``size`` pixels."""

from __future__ import annotations

import random
from collections.abc import Callable

from PIL import ImageDraw

from .pen import Colour, darker


class Place:
    """A canvas with a sky down to the horizon and ground below it; ``horizon`` is a share of the height."""

    def __init__(self, draw: ImageDraw.ImageDraw, size: int, rng: random.Random):
        self.draw, self.size, self.rng = draw, size, rng
        self.horizon = rng.uniform(0.5, 0.62)
        self.brightness = rng.uniform(0.92, 1.05)

    def fill(self, sky: Colour, ground: Colour) -> None:
        self.rectangle(0, 0, 1, 1, sky)
        self.rectangle(0, self.horizon, 1, 1, ground)

    def rectangle(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        box = [value * self.size for value in (left, top, right, bottom)]
        self.draw.rectangle(box, darker(colour, self.brightness))

    def ellipse(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        box = [value * self.size for value in (left, top, right, bottom)]
        self.draw.ellipse(box, darker(colour, self.brightness))

    def polygon(self, points: list[tuple[float, float]], colour: Colour) -> None:
        self.draw.polygon([(x * self.size, y * self.size) for x, y in points], darker(colour, self.brightness))


def beach(place: Place) -> None:
    place.fill((150, 210, 245), (240, 215, 150))
    place.rectangle(0, place.horizon - 0.14, 1, place.horizon, (50, 140, 200))
    x = place.rng.uniform(0.08, 0.8)
    place.ellipse(x, 0.06, x + 0.15, 0.21, (255, 240, 120))


def grass(place: Place) -> None:
    place.fill((165, 215, 250), (110, 185, 80))
    x = place.rng.uniform(-0.1, 0.6)
    place.ellipse(x, place.horizon - 0.1, x + 0.7, place.horizon + 0.3, (110, 185, 80))
    x = place.rng.uniform(0, 0.7)
    for dx, dy in ((0, 0.03), (0.09, 0), (0.18, 0.03)):
        place.ellipse(x + dx, 0.1 + dy, x + dx + 0.14, 0.22 + dy, (250, 250, 250))


def snow(place: Place) -> None:
    place.fill((185, 200, 215), (238, 243, 250))
    for _ in range(16):
        x, y = place.rng.random(), place.rng.uniform(0, 0.9)
        place.ellipse(x, y, x + 0.035, y + 0.035, (255, 255, 255))


def night(place: Place) -> None:
    place.fill((20, 25, 70), (35, 60, 60))
    for _ in range(9):
        x, y = place.rng.random(), place.rng.uniform(0, 0.45)
        place.ellipse(x, y, x + 0.025, y + 0.025, (255, 255, 220))
    x = place.rng.uniform(0.08, 0.75)
    place.ellipse(x, 0.07, x + 0.16, 0.23, (240, 240, 200))
    place.ellipse(x + 0.06, 0.05, x + 0.2, 0.19, (20, 25, 70))


def desert(place: Place) -> None:
    place.fill((250, 190, 120), (215, 140, 70))
    for _ in range(2):
        x = place.rng.uniform(-0.1, 0.7)
        top = place.horizon - 0.15
        place.polygon([(x, place.horizon), (x + 0.2, top), (x + 0.45, place.horizon)], (190, 115, 60))


def room(place: Place) -> None:
    place.fill((235, 200, 205), (165, 110, 65))
    for stripe in range(5):
        place.rectangle(0.2 * stripe, 0, 0.2 * stripe + 0.08, place.horizon, (215, 170, 180))
    place.rectangle(0, place.horizon - 0.04, 1, place.horizon, (250, 245, 235))


def tiles(place: Place) -> None:
    place.fill((200, 225, 215), (235, 235, 235))
    height = (1 - place.horizon) / 3
    for row in range(3):
        for column in range(row % 2, 6, 2):
            x, y = column / 6, place.horizon + row * height
            place.rectangle(x, y, x + 1 / 6, y + height, (90, 110, 120))


def forest(place: Place) -> None:
    place.fill((140, 185, 170), (75, 95, 50))
    for trunk in range(6):
        x = (trunk + place.rng.uniform(0, 0.6)) / 6
        place.rectangle(x + 0.03, place.horizon - 0.15, x + 0.07, place.horizon, (80, 60, 40))
        place.polygon(
            [(x - 0.07, place.horizon - 0.1), (x + 0.05, 0.08), (x + 0.17, place.horizon - 0.1)], (35, 95, 65)
        )


def city(place: Place) -> None:
    place.fill((205, 215, 225), (115, 115, 120))
    for tower in range(5):
        x, top = tower / 5, place.rng.uniform(0.12, 0.35)
        place.rectangle(x, top, x + 0.17, place.horizon, (130, 135, 155))
        for window in range(3):
            y = top + 0.04 + window * 0.08
            place.rectangle(x + 0.03, y, x + 0.07, y + 0.04, (250, 235, 150))
            place.rectangle(x + 0.1, y, x + 0.14, y + 0.04, (250, 235, 150))
    place.rectangle(0, 0.9, 1, 0.92, (230, 230, 230))


def space(place: Place) -> None:
    place.fill((15, 12, 25), (120, 115, 125))
    for _ in range(12):
        x, y = place.rng.random(), place.rng.uniform(0, 0.5)
        place.ellipse(x, y, x + 0.02, y + 0.02, (255, 255, 255))
    x = place.rng.uniform(0.05, 0.7)
    place.ellipse(x, 0.08, x + 0.22, 0.3, (205, 120, 80))
    place.polygon([(x - 0.06, 0.23), (x + 0.27, 0.12), (x + 0.28, 0.15), (x - 0.05, 0.26)], (240, 205, 150))
    for _ in range(3):
        x, y = place.rng.uniform(0, 0.85), place.rng.uniform(0.7, 0.93)
        place.ellipse(x, y, x + 0.14, y + 0.05, (90, 85, 95))


# the words of a caption after the thing: "a red car on the beach"
PLACES: dict[str, Callable[[Place], None]] = {
    "on the beach": beach,
    "on the grass": grass,
    "in the snow": snow,
    "at night": night,
    "in the desert": desert,
    "in a room": room,
    "on a tiled floor": tiles,
    "in the forest": forest,
    "in the city": city,
    "in space": space,
}
