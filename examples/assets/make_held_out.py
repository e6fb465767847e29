"""Draws what a fine-tuned sdxl-tiny should be able to draw: pictures of each subject that no training sees.

    python examples/assets/make_held_out.py --output_dir outputs/subject-held-out

Of each subject ten pictures in other poses before other walls, whose caption is the instance prompt, and one in each of
the ten places of the data, whose caption names it. A folder a subject, with a metadata.jsonl of the captions.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from make_subject import held_out_pose, picture, picture_in_place
from PIL import Image
from tiny_places import PLACES
from tiny_subjects import SUBJECTS, Subject

WALLS = 10  # pictures before a plain wall
CARD = Path(__file__).with_name("held_out_card.md")


def held_out(subject: Subject) -> list[tuple[str, Image.Image]]:
    """(caption, picture) of each: first those before a wall, then those in the places."""
    prompt = subject.instance_prompt
    before_walls = [(prompt, picture(held_out_pose(number), subject=subject)) for number in range(WALLS)]
    return before_walls + [(f"{prompt} {place}", picture_in_place(place, 0, subject=subject)) for place in PLACES]


def main(output_dir: Path) -> None:
    for name, subject in SUBJECTS.items():
        folder = output_dir / name
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for number, (caption, image) in enumerate(held_out(subject)):
            image.save(folder / f"{number:02d}.png")
            lines.append(json.dumps({"file_name": f"{number:02d}.png", "text": caption}) + "\n")
        (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    (output_dir / "README.md").write_text(CARD.read_text(encoding="utf-8"), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("outputs/subject-held-out"),
        help="folder of the pictures (default: %(default)s)",
    )
    main(**vars(parser.parse_args()))
