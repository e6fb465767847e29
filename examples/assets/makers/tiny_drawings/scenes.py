"""Scenes with captions, drawn by this project itself: what clip-tiny and sdxl-tiny are trained on.

    "a photo of a small red and yellow toy on the left on the beach"

A scene is one thing in one place. Everything about it follows from (split, seed, index); different splits share no
scene. A caption names the thing and leaves out, now and then, its colours, its place or how it begins, so that
"a photo of a toy" is a caption too. Pictures are drawn at four times their size and averaged, which smooths the edges.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from .objects import COLOURS, FLOATING, KINDS, USUAL_ACCENT
from .pen import Colour, Pen
from .places import PLACES, Place

SIZE = 64  # pixels
SMOOTHING = 4  # canvas pixels a side for each pixel
SIZES = {"small": 0.17, "": 0.25, "large": 0.34}  # the thing's radius as a share of the picture
SIDES = {"on the left": 0.27, "": 0.5, "on the right": 0.73}  # its centre
BEGINNINGS = ("a photo of", "a picture of", "")
SUBJECT_WORD = "sks"  # in the vocabulary, never in a caption
TOY_SHARE = 0.2  # the class that the subject belongs to comes more often than another


@dataclass(frozen=True)
class Scene:
    """What is to be seen: words of the caption, and the random seed of all that the caption doesn't say."""

    kind: str
    colour: str
    accent: str
    size: str
    side: str
    place: str
    details: str  # seeds shape variants, poses, jitter and the place's own decoration

    @property
    def caption(self) -> str:
        """The full caption: everything that is to be seen is said."""
        return self.words("a photo of", colours=True, place=True)

    def words(self, beginning: str, colours: bool, place: bool) -> str:
        """A caption that begins so, with or without the colours and the place."""
        colour = self.colour
        if self.accent != USUAL_ACCENT[self.kind]:
            colour = f"{self.colour} and {self.accent}"
        parts = (self.size, colour if colours else "", self.kind)
        thing = " ".join(part for part in parts if part)
        thing = ("an " if thing.startswith("orange") else "a ") + thing
        return " ".join(part for part in (beginning, thing, self.side, self.place if place else "") if part)


def scene(split: str, seed: int, index: int) -> Scene:
    """The scene of that number; ``split`` says what it is for."""
    details = f"{split}-{seed}-{index}"
    rng = random.Random(details)
    kind = "toy" if rng.random() < TOY_SHARE else rng.choice(list(KINDS))
    colour = rng.choice(list(COLOURS))
    usual = USUAL_ACCENT[kind]
    accent = (
        usual if rng.random() < 0.4 and usual != colour else rng.choice([name for name in COLOURS if name != colour])
    )
    size = rng.choice(("small", "", "", "large"))
    side = rng.choice(("on the left", "", "", "on the right"))
    return Scene(kind, colour, accent, size, side, rng.choice(list(PLACES)), details)


def training_caption(shown: Scene) -> str:
    """One of the scene's captions: each omission has its own odds."""
    rng = random.Random(f"caption-{shown.details}")
    beginning = rng.choices(BEGINNINGS, weights=(0.7, 0.15, 0.15))[0]
    return shown.words(beginning, colours=rng.random() < 0.8, place=rng.random() < 0.9)


def scenes(split: str, seed: int, count: int, start: int = 0) -> list[Scene]:
    """Scenes number ``start`` to ``start + count``."""
    return [scene(split, seed, index) for index in range(start, start + count)]


def distinct_scenes(split: str, seed: int, count: int) -> list[Scene]:
    """The first ``count`` scenes whose full captions all differ: what retrieval can be measured on."""
    by_caption: dict[str, Scene] = {}
    index = 0
    while len(by_caption) < count:
        drawn = scene(split, seed, index)
        by_caption.setdefault(drawn.caption, drawn)
        index += 1
    return list(by_caption.values())


def render(shown: Scene, size: int = SIZE) -> Image.Image:
    """The scene as an RGB picture of ``size`` × ``size`` pixels."""
    rng = random.Random(f"picture-{shown.details}")
    image, draw, place = paint_place(shown.place, size, rng)
    radius = SIZES[shown.size] * rng.uniform(0.92, 1.08)
    x = SIDES[shown.side] + rng.uniform(-0.05, 0.05)
    base = (
        0.5 + radius if shown.kind in FLOATING else min(0.96, place.horizon + radius * 0.55 + rng.uniform(0.02, 0.12))
    )
    pen = stand(draw, size, x, base, radius, mirrored=rng.random() < 0.5, shadow=shown.kind not in FLOATING)
    colours = (jittered(COLOURS[name], rng) for name in (shown.colour, shown.accent))
    KINDS[shown.kind](pen, *colours, rng)
    return smoothed(image, size)


def paint_place(name: str, size: int, rng: random.Random) -> tuple[Image.Image, ImageDraw.ImageDraw, Place]:
    """A canvas, SMOOTHING times as large as the picture, with the place on it."""
    image = Image.new("RGB", (size * SMOOTHING, size * SMOOTHING))
    draw = ImageDraw.Draw(image)
    place = Place(draw, size * SMOOTHING, rng)
    PLACES[name](place)
    return image, draw, place


def stand(
    draw: ImageDraw.ImageDraw, size: int, x: float, base: float, radius: float, mirrored: bool, shadow: bool
) -> Pen:
    """A pen for a thing whose lowest point is at (x, base), shares of the picture; with the thing's shadow below."""
    side = size * SMOOTHING
    if shadow:
        box = (x - radius, base - radius * 0.12, x + radius, base + radius * 0.12)
        draw.ellipse([value * side for value in box], (50, 50, 50))
    return Pen(draw, (x * side, (base - radius) * side), radius * side, mirrored)


def smoothed(image: Image.Image, size: int) -> Image.Image:
    return image.resize((size, size), Image.Resampling.BOX)


def jittered(colour: Colour, rng: random.Random, by: int = 10) -> Colour:
    return tuple(max(0, min(255, value + rng.randint(-by, by))) for value in colour)
