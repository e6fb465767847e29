"""Draws the five pictures of one subject that DreamBooth learns: the toy of the default run, or another.

    python examples/assets/makers/make_subject.py --output_dir outputs/subject
    python examples/assets/makers/make_subject.py --subject car --output_dir outputs/subject-car

The subject's class is known to sdxl-tiny, the subject itself isn't (see tiny_drawings/subjects.py). It stands on a
table before a plain wall, in five poses, before five walls, so that the places of the prompts have to come from the
model. A benchmark asks for pictures beyond the five, which no training sees: in other poses before other walls, and in
the data's places.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw
from tiny_drawings.pen import Colour
from tiny_drawings.places import PLACES
from tiny_drawings.scenes import SMOOTHING, paint_place, smoothed, stand
from tiny_drawings.subjects import SUBJECTS, Subject

SIZE = 128  # pixels: twice what sdxl-tiny draws, so that the training has something to resize
TOY = SUBJECTS["toy"]


@dataclass(frozen=True)
class Pose:
    """One picture of the subject: before which wall, on which table; radius, x, base and the table's edge are shares of
    the picture; arms (or what else the subject moves) from 0 to 1."""

    wall: Colour
    table: Colour
    edge: float
    radius: float
    x: float
    base: float
    arms: float
    mirrored: bool = False


POSES = (
    Pose((225, 220, 205), (190, 170, 140), 0.60, 0.30, 0.50, 0.90, 0.2),
    Pose((200, 215, 225), (150, 150, 155), 0.64, 0.26, 0.45, 0.88, 0.9, mirrored=True),
    Pose((235, 235, 235), (210, 205, 200), 0.58, 0.33, 0.53, 0.93, 0.6),
    Pose((205, 225, 205), (170, 150, 130), 0.62, 0.28, 0.49, 0.90, 0.0, mirrored=True),
    Pose((225, 205, 215), (185, 160, 150), 0.60, 0.31, 0.54, 0.92, 1.0),
)


def held_out_pose(number: int) -> Pose:
    """A pose of the same kind that is none of the five."""
    rng = random.Random(f"held-out pose {number}")
    wall, table = rng.randint(200, 235), rng.randint(150, 205)
    return Pose(
        wall=tuple(wall + rng.randint(-12, 12) for _ in range(3)),
        table=tuple(table + rng.randint(-20, 20) for _ in range(3)),
        edge=rng.uniform(0.58, 0.64),
        radius=rng.uniform(0.26, 0.33),
        x=rng.uniform(0.45, 0.55),
        base=rng.uniform(0.88, 0.93),
        arms=rng.random(),
        mirrored=rng.random() < 0.5,
    )


def picture(pose: Pose, size: int = SIZE, subject: Subject = TOY) -> Image.Image:
    """The subject in that pose, as an RGB picture of ``size`` × ``size`` pixels."""
    side = size * SMOOTHING
    image = Image.new("RGB", (side, side), pose.wall)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, pose.edge * side, side, side), pose.table)
    subject.draw(stand(draw, size, pose.x, pose.base, pose.radius, pose.mirrored, shadow=True), pose.arms)
    return smoothed(image, size)


def picture_in_place(place: str, number: int, size: int = SIZE, subject: Subject = TOY) -> Image.Image:
    """The subject in a place of the data, such as "on the beach": what a sample of that prompt should look like."""
    rng = random.Random(f"in place {place} {number}")
    image, draw, painted = paint_place(place, size, rng)
    radius = rng.uniform(0.26, 0.33)
    base = min(0.96, painted.horizon + radius * 0.55 + rng.uniform(0.02, 0.12))
    pen = stand(draw, size, rng.uniform(0.45, 0.55), base, radius, mirrored=rng.random() < 0.5, shadow=True)
    subject.draw(pen, rng.random())
    return smoothed(image, size)


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


def main(output_dir: Path, subject: str = "toy") -> None:
    chosen = SUBJECTS[subject]
    output_dir.mkdir(parents=True, exist_ok=True)
    for number, pose in enumerate(POSES, start=1):
        picture(pose, subject=chosen).save(output_dir / f"{number}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, default=Path("outputs/subject"), help="folder of the pictures (default: %(default)s)"
    )
    parser.add_argument("--subject", choices=list(SUBJECTS), default="toy", help="which one (default: %(default)s)")
    main(**vars(parser.parse_args()))
