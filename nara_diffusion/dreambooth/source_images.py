"""Images of a folder with captions and, for edit models, the source images that they were made from.

Either a line of metadata.jsonl names the sources, relative to the folder,

    {"file_name": "after.png", "source": "source/before.png", "text": "make it red"}

where "source" may also be a list, or a second folder has an image with the same name. A source that
has no line of its own isn't trained on as an image.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nara_diffusion.utils.wording import listed

from .captions import METADATA_FILE, fill_captions, own_captions
from .image_records import ImageRecord, files_of_images, image_files, make_records

Sources = Mapping[str, Sequence[Path]]
"""{name of an image file: paths of its sources}."""


def records_from_folder(
    folder: str | Path,
    *,
    source_folder: str | Path | None = None,
    most: int = 0,
    prompt: str | None = None,
    caption_column: str | None = None,
    trigger: str | None = None,
    progress: bool = True,
) -> list[ImageRecord]:
    """Return the images of a folder, by name, with their captions and sources.

    Args:
        source_folder: a folder with a source of the same name for each image; None reads the
            sources in metadata.jsonl.
        most: the number of sources that the model takes; 0 reads none of them.
        prompt: the prompt of images without a caption.
        caption_column: the key of captions in metadata.jsonl; None takes "text".
        trigger: the word that replaces [trigger] in captions.

    Raises:
        ValueError: there are no images; some images are broken (the message names all of them); a
            caption is missing or can't be read; or images and sources don't match.
        OSError: the folder can't be read.
    """
    images = image_files(folder)
    captions = dict(zip(images, own_captions(images, caption_column), strict=True))
    sources: Sources = {}
    if source_folder is not None:
        stems = files_of_images(Path(source_folder), [image.name for image in images])
        sources = {image.name: [stems[image.stem]] for image in images if image.stem in stems}
    elif most:
        sources = sources_in_metadata(Path(folder))
    paths = dict.fromkeys(path for named in sources.values() for path in named)
    resolved = {path.resolve() for path in paths}
    targets = [
        image for image in images if image.name in sources or image.resolve() not in resolved
    ]
    names = [target.name for target in targets]
    check_pairs(names, sources, folder, most)
    filled = fill_captions([captions[target] for target in targets], names, prompt, trigger)
    captioned = zip(targets, filled, strict=True)
    files = [(str(path), path.read_bytes, caption) for path, caption in captioned]
    records = make_records(files, progress=progress)
    files = [(str(path), path.read_bytes, "") for path in paths]
    loaded = dict(zip(paths, make_records(files, progress=progress), strict=True))
    return [
        replace(record, sources=tuple(loaded[path] for path in sources.get(name, ())))
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
