"""Draws pairs of an edit that kontext-tiny wasn't trained on: 12 to learn and 4 that are held out.

    python examples/assets/makers/make_pairs.py --output_dir outputs/pairs --edit remove

Each folder has the edited pictures, a metadata.jsonl with their prompt, and their sources in source/.
"""

# ruff: noqa: RUF009 (option() is dataclasses.field() with metadata, not a shared default)
from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps
from tiny_drawings.scenes import SIZE, Scene, paint_place, render, scene, smoothed
from tiny_training import option, parse


def removed(shown: Scene) -> Image.Image:
    """The place without the thing."""
    rng = random.Random(f"picture-{shown.details}")  # that of `render`, which paints the place first
    image, _, _ = paint_place(shown.place, SIZE, rng)
    return smoothed(image, SIZE)


EDITS: dict[str, tuple[str, Callable[[Scene], Image.Image]]] = {
    "remove": ("remove it", removed),
    "mirror": ("mirror the picture", lambda shown: ImageOps.mirror(render(shown))),
    "grey": ("make the picture grey", lambda shown: ImageOps.grayscale(render(shown)).convert("RGB")),
}
"""Name → (prompt, the edited picture of a scene)."""


@dataclass
class Arguments:
    """What the command line sets."""

    output_dir: Path = option(Path("outputs/pairs"), "folder of the folders train and held-out")
    edit: str = option("remove", f"one of {', '.join(EDITS)}")
    train: int = option(12, "pairs to learn from")
    held_out: int = option(4, "pairs to measure")


def main(args: Arguments) -> None:
    """Draws both folders."""
    prompt, edited = EDITS[args.edit]
    for name, count in (("train", args.train), ("held-out", args.held_out)):
        folder, lines = args.output_dir / name, []
        (folder / "source").mkdir(parents=True, exist_ok=True)
        for number in range(count):
            file, shown = f"{number + 1}.png", scene(f"pairs-{name}", 0, number)
            render(shown).save(folder / "source" / file)
            edited(shown).save(folder / file)
            lines.append(json.dumps({"file_name": file, "source": f"source/{file}", "text": prompt}) + "\n")
        (folder / "metadata.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main(parse(Arguments, __doc__))
