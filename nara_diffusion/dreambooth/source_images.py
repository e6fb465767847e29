"""Pairs of images for edit models: each image of a folder with the source images that it was made from.

Either a line of metadata.jsonl names the sources, relative to the folder,

    {"file_name": "after.png", "source": "source/before.png", "text": "make it red"}

where "source" may also be a list, or a second folder has an image with the same name. A source that
has no line of its own isn't trained on as an image.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from nara_diffusion.utils.wording import listed

from .captions import METADATA_FILE, fill_captions, own_captions, put_trigger
from .image_records import ImageRecord, files_of_images, image_files, make_records

Sources = Mapping[str, Sequence[Path]]
"""{name of an image file: paths of its sources}."""


def records_of_pairs(
    folder: str | Path,
    source_folder: str | Path | None = None,
    *,
    most: int,
    prompt: str | None = None,
    caption_column: str | None = None,
    trigger: str | None = None,
    progress: bool = True,
) -> list[ImageRecord]:
    """Return the images of a folder with their captions and sources, or without any source.

    Args:
        source_folder: a folder with a source of the same name for each image; None reads
            metadata.jsonl.
        most: the number of sources that the model takes.
        prompt, caption_column, trigger: as in `records_from_folder`.

    Raises:
        ValueError: images and sources don't match, or see `records_from_folder`.
    """
    images = image_files(folder)
    captions = dict(zip(images, own_captions(images, caption_column), strict=True))
    if source_folder is None:
        sources = sources_in_metadata(Path(folder))
    else:
        files = files_of_images(Path(source_folder), [image.name for image in images])
        sources = {image.name: [files[image.stem]] for image in images if image.stem in files}
    paths = {path.resolve() for named in sources.values() for path in named}
    targets = [image for image in images if image.name in sources or image.resolve() not in paths]
    names = [target.name for target in targets]
    check_pairs(names, sources, folder, most)
    filled = fill_captions([captions[target] for target in targets], names, prompt)
    filled = [put_trigger(caption, trigger) for caption in filled]
    contents = [(str(path), path.read_bytes) for path in targets]
    records = make_records(contents, filled, progress=progress)
    if not sources:
        return records
    contents = [(str(path), path.read_bytes) for name in names for path in sources[name]]
    loaded = iter(make_records(contents, [""] * len(contents), progress=progress))
    return [
        replace(record, sources=tuple(islice(loaded, len(sources[name]))))
        for record, name in zip(records, names, strict=True)
    ]


def sources_in_metadata(folder: Path) -> Sources:
    """Return the sources that the lines of metadata.jsonl name.

    Raises:
        ValueError: a source is no path, or there is no such file. The message has the line.
    """
    metadata = folder / METADATA_FILE
    sources: dict[str, list[Path]] = {}
    if not metadata.exists():
        return sources
    for number, line in enumerate(metadata.read_text(encoding="utf-8-sig").split("\n"), 1):
        row: dict[str, Any] = json.loads(line) if line.strip() else {}
        if row.get("source") is None:
            continue
        paths = row["source"] if isinstance(row["source"], list) else [row["source"]]
        for path in paths:
            if not isinstance(path, str) or not (folder / path).is_file():
                raise ValueError(
                    f"{metadata}, line {number}: there is no source {path!r} in {folder}: name a file relative to the "
                    "folder, or a list of files."
                )
        sources[row["file_name"]] = [folder / path for path in paths]
    return sources


def check_pairs(names: Sequence[str], sources: Sources, folder: str | Path, most: int) -> None:
    """Raise ValueError if one of the images has no source, or more than `most`."""
    missing = [name for name in names if not sources.get(name)]
    if sources and missing:
        raise ValueError(
            f"{len(missing)} of {len(names)} images in {folder} have no source ({listed(missing)}): add their sources, "
            "or remove the images."
        )
    for name, paths in sources.items():
        if len(paths) > most:
            raise ValueError(
                f"{name} has {len(paths)} sources, but the model takes {most}: name fewer."
            )
