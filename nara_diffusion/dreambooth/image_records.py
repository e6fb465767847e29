"""A folder of images as records: upright RGB images with a caption each.

EXIF rotation is applied, what is transparent becomes white, of an animation the first frame is taken. All images are
decoded once before training starts, so that a broken one shows at once and not at step 3 000. Pixels aren't kept: they
are read again when a crop of them is needed, most often once for the latent cache.

Captions come from a metadata.jsonl in the folder, {"file_name": "dog.png", "text": "a photo of …"} a line, else from
text files beside the images, dog.txt of dog.png. A line for an image that isn't there is an error. An image without a
caption of its own gets the instance prompt, and the log says so; without an instance prompt it is an error.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm.auto import tqdm

from nara_diffusion.utils.naming import counted, listed

logger = logging.getLogger(__name__)

Size = tuple[int, int]
"""(height, width) in pixels."""
IMAGE_SUFFIXES = frozenset(
    [".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"]
)
METADATA_FILE = "metadata.jsonl"
LONGEST = 32
"""How many times longer than its shorter side an image may be. A crop of a longer one shows next to nothing of it."""


# ---------------------------------------------------------------------- images


@dataclass(frozen=True)
class ImageRecord:
    """One image of the training data."""

    name: str  # for messages
    read: Callable[[], bytes]  # returns the bytes of its file
    size: Size  # (H, W), upright
    prompt: str  # its caption
    key: str  # a digest of its bytes, for caches

    def load(self) -> Image.Image:
        """The image, upright, in mode RGB. Raises ValueError if it can't be decoded."""
        return decode_image(self.read(), self.name)


def load_image(path: str | Path) -> Image.Image:
    """The image of a file, upright, in mode RGB. Raises ValueError if it can't be decoded."""
    return decode_image(Path(path).read_bytes(), str(path))


def decode_image(content: bytes, name: str) -> Image.Image:
    """The image of a file's bytes, upright, in mode RGB; `name` is for the ValueError if it can't be decoded."""
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
        if image.mode == "F" or image.mode.startswith("I"):
            raise ValueError(f"mode {image.mode} holds values of an unknown range")
        return to_rgb(image)
    except Exception as error:  # Pillow's decoders raise a dozen classes
        why = f"{type(error).__name__}: {error}"
        if isinstance(error, UnidentifiedImageError):  # whose own message is a memory address
            why = "no kind of image that Pillow reads"
        raise ValueError(
            f"{name} can't be decoded ({why}): save it again as 8-bit PNG or JPEG, or remove it."
        ) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` in mode RGB, what is transparent in white."""
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def image_files(folder: str | Path) -> list[Path]:
    """The image files directly in `folder`, by name; a warning lists what else lies there. Raises ValueError for no
    images, and for subfolders as kohya's scripts name them, such as "10_sks dog"."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"the image folder {folder} doesn't exist: name a folder of .png or .jpg files."
        )
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    images = [entry for entry in entries if entry.suffix.lower() in IMAGE_SUFFIXES]
    known = {
        folder / METADATA_FILE,
        folder / "README.md",
        *(image.with_suffix(".txt") for image in images),
    }
    others = [entry.name for entry in entries if entry not in images and entry not in known]
    for name in others:
        if re.match(r"\d+_", name) and (folder / name).is_dir():
            raise ValueError(
                f"{folder} holds {name!r}: repeats and a prompt in a folder's name aren't read. Put the images "
                "directly into one folder, and give --instance_prompt."
            )
    if not images:
        found = f", only {', '.join(others[:4])}" if others else ""
        raise ValueError(
            f"the image folder {folder} holds no images{found}: put .png or .jpg files into it."
        )
    if others:
        logger.warning("%s: left out what isn't an image: %s", folder, ", ".join(others[:4]))
    return images


def records_from_folder(
    folder: str | Path,
    *,
    prompt: str | None = None,
    caption_column: str | None = None,
    progress: bool = True,
) -> list[ImageRecord]:
    """The images of a folder, by name, with their captions.

    Args:
        prompt: of images without a caption of their own.
        caption_column: the key of captions in metadata.jsonl; None takes "text".

    Raises:
        ValueError: the folder has no images or broken ones (all are named); or a caption is missing or unreadable.
        OSError: the folder can't be read.
    """
    images = image_files(folder)
    captions = fill_captions(
        own_captions(images, caption_column), [image.name for image in images], prompt
    )
    return make_records(
        [(str(path), path.read_bytes) for path in images], captions, progress=progress
    )


def class_records(folder: str | Path, *, prompt: str, progress: bool = True) -> list[ImageRecord]:
    """The class images of prior preservation; all have the class prompt. Raises as `records_from_folder`."""
    sources = [(str(path), path.read_bytes) for path in image_files(folder)]
    return make_records(
        sources, [check_prompt(prompt, "class_prompt")] * len(sources), progress=progress
    )


def make_records(
    sources: Sequence[tuple[str, Callable[[], bytes]]],
    prompts: Sequence[str],
    *,
    progress: bool = True,
) -> list[ImageRecord]:
    """The record of each (name, function that returns its bytes), decoded once for its size and to see it is whole.
    Raises ValueError that names all images that are broken."""
    records, broken = [], []
    bar = tqdm(
        sources, desc="check images", unit="image", disable=not progress or len(sources) < 50
    )
    for (name, read), prompt in zip(bar, prompts, strict=True):
        try:
            records.append(_record(name, read, prompt))
        except OSError as error:
            broken.append(
                f"{name} can't be read ({error.strerror}): put an image file there, or remove it."
            )
        except ValueError as error:
            broken.append(str(error))
    if broken:
        raise ValueError(
            f"{len(broken)} of {len(sources)} images can't be used:\n" + "\n".join(broken[:8])
        )
    return records


def _record(name: str, read: Callable[[], bytes], prompt: str) -> ImageRecord:
    """Raises ValueError for an image that can't be used, OSError for a file that can't be read."""
    content = read()
    width, height = decode_image(content, name).size
    if max(width, height) > LONGEST * min(width, height):
        raise ValueError(
            f"{name} is {width} x {height} pixels: one side is more than {LONGEST} times the other. Cut it to the part "
            "to learn, or remove it."
        )
    key = hashlib.blake2b(content, digest_size=16).hexdigest()
    return ImageRecord(name, read, (height, width), prompt, key)


# ---------------------------------------------------------------------- captions


def check_prompt(prompt: str, name: str) -> str:
    """`prompt` without white space around it. Raises ValueError if nothing is left."""
    if not prompt.strip():
        raise ValueError(f"{name} is empty: say what the images show, as in 'a photo of sks dog'.")
    return prompt.strip()


def own_captions(images: Sequence[Path], column: str | None = None) -> list[str]:
    """The caption of each image file of one folder, from metadata.jsonl or text files; "" for those without one.

    Args:
        column: the key in metadata.jsonl; None takes "text".

    Raises:
        ValueError: a caption that can't be read, or a row without an image, with the file and the line; `column`
            without a metadata.jsonl.
    """
    metadata = images[0].parent / METADATA_FILE
    if metadata.exists():
        found = _read_metadata(metadata, column or "text", [image.name for image in images])
        _warn_of_images_without_row(metadata, images, found)
        return [found.get(image.name, "") for image in images]
    if column is not None:
        raise ValueError(
            f"caption_column {column!r} is a key of {METADATA_FILE}, which {metadata.parent} lacks."
        )
    files = [image.with_suffix(".txt") for image in images]
    return [" ".join(_read(file).split()) if file.is_file() else "" for file in files]


def _warn_of_images_without_row(
    metadata: Path, images: Sequence[Path], found: Collection[str]
) -> None:
    without = [image for image in images if image.name not in found]
    if without:
        which = (
            f"{len(without)} of {len(images)} images ({listed([image.name for image in without])})"
        )
        unread = any(image.with_suffix(".txt").is_file() for image in without)
        ending = ", and their .txt files are not read" if unread else ""
        logger.warning(
            "%s has no row for %s: their caption is the instance prompt%s", metadata, which, ending
        )


def _read_metadata(path: Path, column: str, images: Sequence[str]) -> dict[str, str]:
    """{file_name: caption} of these names of `images`; null is an empty caption."""
    captions: dict[str, str] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        name, caption = _read_row(line, column, where)
        if name in lines:
            raise ValueError(
                f"{where}: {name} has a caption in line {lines[name]} already: remove one of them."
            )
        if name not in images:
            (near,) = get_close_matches(name.lower(), images, n=1, cutoff=0.0)
            raise ValueError(
                f"{where}: no image of this folder is named {name!r}: write a name that is there, such as {near!r}, or "
                "remove the line."
            )
        captions[name], lines[name] = caption, number
    return captions


def _read_row(line: str, column: str, where: str) -> tuple[str, str]:
    """The file_name and the caption of one line."""
    try:
        row = json.loads(line)
        name, caption = row["file_name"], row[column]
    except (ValueError, KeyError, TypeError, RecursionError) as error:  # of digits and brackets too
        expected = f'{{"file_name": …, "{column}": …}}'
        raise ValueError(f"{where}: expected {expected}, found {line[:60]} ({error}).") from None
    for key, value in (("file_name", name), (column, "" if caption is None else caption)):
        if not isinstance(value, str):
            raise ValueError(
                f"{where}: {key!r} is {json.dumps(value)[:60]}, expected a text in quotes."
            )
    try:
        f"{name}{caption}".encode()  # JSON may spell one half of a surrogate pair, which no tokenizer takes
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise ValueError(
            f"{where} holds half a character, {half}: write the character itself."
        ) from None
    return name, caption or ""


def fill_captions(captions: Sequence[str], names: Sequence[str], prompt: str | None) -> list[str]:
    """`captions` with the instance prompt where one is empty. Raises ValueError if there is no prompt for those."""
    captions = [caption.strip() for caption in captions]
    missing = [name for name, caption in zip(names, captions, strict=True) if not caption]
    which = f"{len(missing)} of {len(names)} images ({listed(missing)}) have no caption"
    if missing and prompt is None:
        raise ValueError(
            f"{which}: give --instance_prompt 'a photo of sks dog', or write a caption for each, in a .txt file beside "
            f"it or in {METADATA_FILE}."
        )
    if 0 < len(missing) < len(names):
        logger.warning("%s: they get %r", which, prompt)
    return [caption or check_prompt(str(prompt), "instance_prompt") for caption in captions]


def trained_on(records: Sequence[ImageRecord], folder: str | Path, prompt: str | None) -> str:
    """The number of images, and what they were said to show: captions of their own, or the instance prompt."""
    own = sum(record.prompt != (prompt or "").strip() for record in records)
    images, file = (
        counted(len(records), "image"),
        "metadata.jsonl" if Path(folder, METADATA_FILE).exists() else ".txt",
    )
    if not own:
        return f"{images} of “{prompt}”"
    others = "" if own == len(records) else f", the others as “{prompt}”"
    return f"{images}, {own} with captions of their own ({file}){others}"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} isn't UTF-8 text ({error}): save it as UTF-8.") from None
