"""Draws the five pictures of one subject that the default DreamBooth run learns: a striped toy with a single eye.

    python examples/assets/make_subject.py --output_dir outputs/subject

The toy's class is known to sdxl-tiny, whose data has toys of many forms; this one isn't among them: none of those is a
cone, has stripes, or has one eye. It stands on a table before a plain wall, in five poses, before five walls, so that
the places of the prompts have to come from the model.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from string import Template

from PIL import Image, ImageDraw
from tiny_objects import COLOURS
from tiny_pen import Colour, Pen, darker
from tiny_scenes import SMOOTHING, smoothed, stand

SIZE = 128  # pixels: twice what sdxl-tiny draws, so that the training has something to resize
INSTANCE_PROMPT = "a photo of sks toy"
CLASS_PROMPT = "a photo of a toy"
CARD_TEMPLATE = Path(__file__).with_name("subject_card.md")


@dataclass(frozen=True)
class Pose:
    """One picture of the subject: before which wall, on which table; radius, x, base and the table's edge are shares of
    the picture; arms from 0 (down) to 1 (up)."""

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


def subject(pen: Pen, arms: float) -> None:
    """The toy: a striped cone with one eye, a ball on its tip, two feet and two arms."""
    purple, yellow, red, orange = (COLOURS[name] for name in ("purple", "yellow", "red", "orange"))
    for side in (-1, 1):
        pen.ellipse(side * 0.38 - 0.24, 0.74, side * 0.38 + 0.24, 1, orange)
        pen.line([(side * 0.42, 0.3), (side * 0.9, 0.65 - 0.8 * arms)], darker(purple, 0.8), 0.16)
    pen.polygon([(0, -0.85), (0.66, 0.88), (-0.66, 0.88)], purple)
    for top, bottom in ((0.16, 0.38), (0.6, 0.82)):
        left, right = 0.38 * (top + 0.85), 0.38 * (bottom + 0.85)  # the cone's half width at both edges of the stripe
        pen.polygon([(-left, top), (left, top), (right, bottom), (-right, bottom)], yellow)
    pen.ellipse(-0.27, -0.42, 0.27, 0.12, (255, 255, 255))
    pen.ellipse(-0.06, -0.26, 0.18, -0.02, (20, 20, 20))
    pen.ellipse(-0.19, -1, 0.19, -0.64, red)


def picture(pose: Pose, size: int = SIZE) -> Image.Image:
    """The subject in that pose, as an RGB picture of ``size`` × ``size`` pixels."""
    side = size * SMOOTHING
    image = Image.new("RGB", (side, side), pose.wall)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, pose.edge * side, side, side), pose.table)
    subject(stand(draw, size, pose.x, pose.base, pose.radius, pose.mirrored, shadow=True), pose.arms)
    return smoothed(image, size)


def main(output_dir: Path) -> None:
    output_dir.mkdir(parents=True, exist_ok=True)
    for number, pose in enumerate(POSES, start=1):
        picture(pose).save(output_dir / f"{number}.png")
    prompts = {"instance_prompt": INSTANCE_PROMPT, "class_prompt": CLASS_PROMPT, "size": SIZE}
    card = Template(CARD_TEMPLATE.read_text(encoding="utf-8")).substitute(prompts)
    (output_dir / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, default=Path("outputs/subject"), help="folder of the pictures (default: %(default)s)"
    )
    main(**vars(parser.parse_args()))
