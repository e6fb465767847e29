"""kohya's layout of training images: subfolders named N_PROMPT, as in `10_sks dog`.

    photos/10_sks dog/*.png      each image 10 times an epoch; "sks dog" where one has no caption
    photos/3_sks dog, muddy/*    each image 3 times

Taken for that only where all subfolders have such names and no image lies beside them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .images import image_files
from .records import ImageRecord, records_from_folder

_NAME = re.compile(r"(\d+)_(.*)", re.DOTALL)


@dataclass(frozen=True)
class RepeatFolder:
    """Attributes:
    path: the folder.
    repeats: N, how often an epoch has each of its images.
    prompt: the rest of its name.
    """

    path: Path
    repeats: int
    prompt: str


def find_repeat_folders(folder: str | Path) -> list[RepeatFolder]:
    """The subfolders of `folder` that are named N_PROMPT, by name; none where no subfolder is.

    Raises:
        ValueError: `folder` can't be read; some subfolders have such names, and others haven't, or images lie beside
            them; N is 0, or PROMPT is empty.
    """
    images, others = image_files(folder)
    subfolders = [entry for entry in others if entry.is_dir() and not entry.name.startswith(".")]
    names = {entry: match for entry in subfolders if (match := _NAME.fullmatch(entry.name))}
    if not names:
        return []
    if images:
        if not any(image_files(entry)[0] for entry in names):
            return []  # they are left out, as other entries are
        raise _ambiguous(folder, list(names), "the images", images)
    if len(names) < len(subfolders):
        raise _ambiguous(folder, list(names), "the subfolders", [entry for entry in subfolders if entry not in names])
    return [_parsed(entry, match) for entry, match in names.items()]


def records_from_subject_folder(
    folder: str | Path,
    *,
    prompt: str | None = None,
    caption_source: str = "auto",
    caption_column: str | None = None,
    progress: bool = True,
) -> list[ImageRecord]:
    """The images of a folder, or of its subfolders N_PROMPT, with captions and repeats.

    Raises:
        ValueError: as `find_repeat_folders` and `records_from_folder`; or `prompt` is given beside folders that say it.
    """
    parts = find_repeat_folders(folder)
    captions = {"caption_source": caption_source, "caption_column": caption_column}
    if not parts:
        return records_from_folder(folder, prompt=prompt, **captions, progress=progress)  # type: ignore[arg-type]
    if prompt is not None:
        raise ValueError(
            f"instance_prompt is {prompt!r}, and the names of subfolders, such as {parts[0].path.name!r} in {folder}, "
            f"say {parts[0].prompt!r} of images without a caption: leave instance_prompt out, or move the images "
            f"directly into {folder} (--repeats says how often an epoch has them)."
        )
    return [
        replace(record, repeats=part.repeats)
        for part in parts
        for record in records_from_folder(part.path, prompt=part.prompt, **captions, progress=progress)  # type: ignore[arg-type]
    ]


def _parsed(path: Path, match: re.Match[str]) -> RepeatFolder:
    repeats, prompt = int(match[1]), match[2].strip()
    if repeats < 1 or not prompt:
        what = "0 repeats" if repeats < 1 else "no prompt"
        raise ValueError(
            f"the name of {path} says {what}: name it N_PROMPT, as 10_sks dog, or move it out of {path.parent}."
        )
    return RepeatFolder(path, repeats, prompt)


def _ambiguous(folder: str | Path, named: Sequence[Path], what: str, beside: Sequence[Path]) -> ValueError:
    found = ", ".join(path.name for path in beside[:4])
    return ValueError(
        f"the image folder {folder} has subfolders whose names give repeats and a prompt ({named[0].name}), and beside "
        f"them {what} {found}: which are the training images? Put all images into folders named N_PROMPT, as 10_sks "
        f"dog, or all directly into {folder}."
    )
