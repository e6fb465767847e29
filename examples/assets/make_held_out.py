"""Draws what a fine-tuned sdxl-tiny should be able to draw: pictures of each subject that no training sees.

    python examples/assets/make_held_out.py --output_dir outputs/held-out --number 10

The subject in other poses before other walls, whose caption is the instance prompt, and in each of the ten places of
the data, whose caption names it. What `../quality/images/held_out.py` measures a loss on; as a program it writes some
of them to look at, a folder a subject.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from make_subject import held_out_pose, picture, picture_in_place
from PIL import Image
from tiny_places import PLACES
from tiny_subjects import SUBJECTS, Subject


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


def main(output_dir: Path, number: int) -> None:
    for name, subject in SUBJECTS.items():
        folder = output_dir / name
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        pictures = [*in_poses(subject, range(number)), *in_places(subject, range(number))]
        for index, (caption, image) in enumerate(pictures):
            image.save(folder / f"{index:03d}.png")
            lines.append(json.dumps({"file_name": f"{index:03d}.png", "text": caption}) + "\n")
        (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("outputs/held-out"),
        help="folder of the pictures (default: %(default)s)",
    )
    parser.add_argument("--number", type=int, default=1, help="of poses, and of pictures in each place (default: 1)")
    main(**vars(parser.parse_args()))
