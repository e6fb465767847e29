"""A folder of images as records: upright RGB images, each with a caption (`captions`).

EXIF rotation is applied, transparent parts become white, and an animation gives its first frame.
All images are decoded once before training, so that a broken image is found at once and not at
step 3 000. Pixels aren't kept in memory. They are read again when a crop is needed, usually once,
for the latent cache.

A mask weights the squared errors of an image's pixels:

    w = max(mean of the mask over a latent's pixels, floor),    white = 1, black = 0
    loss = mean of w · (prediction − target)²

The mean is over all latents, also those outside the mask, as in kohya's scripts and OneTrainer. A
mask is a grey image in the folder `mask` beside its image, with the same name, or the image's alpha
channel. An image without a mask has w = 1.
"""

from __future__ import annotations

import hashlib
import io
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm.auto import tqdm

from nara_diffusion.utils.wording import counted, listed

from .captions import METADATA_FILE, check_prompt

logger = logging.getLogger(__name__)

Size = tuple[int, int]
"""(height, width) in pixels."""
ImageFile = tuple[str, Callable[[], bytes], str]
"""The name of an image, a function that returns the bytes of its file, and its caption."""
MASK_FOLDER = "mask"
"""The folder of the images' masks, inside of theirs."""
SOURCE_FOLDER = "source"
"""The usual folder of the images that an edit model edits, inside of theirs."""
IMAGE_SUFFIXES = frozenset(
    [".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"]
)


@dataclass(frozen=True)
class ImageRecord:
    """One image of the training data."""

    name: str  # for messages
    read: Callable[[], bytes]  # returns the bytes of its file
    size: Size  # (H, W), upright
    prompt: str  # its caption
    key: str  # a digest of its bytes, for caches
    sources: tuple[ImageRecord, ...] = ()  # the images that an edit model makes it from
    mask: ImageRecord | None = None  # weights its errors (`masks`); None weights all by 1

    def load(self) -> Image.Image:
        """Return the image, upright, in mode RGB. Raise ValueError if it can't be decoded."""
        return decode_image(self.read(), self.name)


def load_image(path: str | Path) -> Image.Image:
    """Return a file's image, upright, in mode RGB. Raise ValueError if it can't be decoded."""
    return decode_image(Path(path).read_bytes(), str(path))


def decode_image(content: bytes, name: str) -> Image.Image:
    """Return the image in the bytes of a file, upright, in mode RGB.

    Args:
        name: the name of the file, for the message.

    Raises:
        ValueError: the image can't be decoded.
    """
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
        if image.mode == "F" or image.mode.startswith("I"):
            raise ValueError(f"its mode {image.mode} doesn't say the range of its values")
        return to_rgb(image)
    except Exception as error:  # Pillow's decoders raise a dozen classes
        why = f"{type(error).__name__}: {error}"
        if isinstance(error, UnidentifiedImageError):  # its own message is a memory address
            why = "not an image that Pillow can read"
        raise ValueError(
            f"{name} can't be decoded ({why}): save it as an 8-bit PNG or JPEG, or remove it."
        ) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Return `image` in mode RGB, with transparent parts in white."""
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def image_files(folder: str | Path) -> list[Path]:
    """Return the image files directly in `folder`, by name. Log a warning about all other files.

    Raises:
        ValueError: there are no images, or there is a subfolder named as in kohya's scripts, such
            as "10_sks dog".
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}: name one with .png or .jpg files.")
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    images = [entry for entry in entries if entry.suffix.lower() in IMAGE_SUFFIXES]
    read = {*images, folder / METADATA_FILE, folder / "README.md"}
    read |= {folder / MASK_FOLDER, folder / SOURCE_FOLDER}
    read.update(image.with_suffix(".txt") for image in images)
    unread = [entry.name for entry in entries if entry not in read]
    for name in unread:
        if re.match(r"\d+_", name) and (folder / name).is_dir():
            raise ValueError(
                f"{folder} contains the folder {name!r}. Repeats and prompts in a folder's name aren't supported: name "
                "the folder in --dataset_config, with repeats and instance_prompt."
            )
    names = ", ".join(unread[:4])
    if not images:
        content = f", only {names}" if unread else ""
        raise ValueError(f"{folder} contains no images{content}: add .png or .jpg files.")
    if unread:
        logger.warning("%s: these files are ignored, since they aren't images: %s", folder, names)
    return images


def files_of_images(folder: Path, images: Iterable[str]) -> dict[str, Path]:
    """Return {stem: file} of the files in `folder` that belong to images of the same name.

    Raises:
        ValueError: two files have one stem, or a file has no image.
    """
    files: dict[str, Path] = {}
    for file in image_files(folder):
        first = files.setdefault(file.stem, file)
        if first != file:
            raise ValueError(
                f"{folder} has two images named {file.stem!r} ({first.name}, {file.name}), so their pair is "
                "unclear: rename one."
            )
    unused = sorted(files.keys() - {Path(image).stem for image in images})
    if unused:
        names = listed([files[stem].name for stem in unused])
        raise ValueError(
            f"{folder} has files without an image of the same name ({names}): remove them, or add the images."
        )
    return files


def class_records(folder: str | Path, *, prompt: str, progress: bool = True) -> list[ImageRecord]:
    """Return the class images for prior preservation, all with the class prompt.

    Raises:
        ValueError, OSError: see `source_images.records_from_folder`.
    """
    prompt = check_prompt(prompt, "class_prompt")
    files = [(str(path), path.read_bytes, prompt) for path in image_files(folder)]
    return make_records(files, progress=progress)


def make_records(files: Sequence[ImageFile], *, progress: bool = True) -> list[ImageRecord]:
    """Return the record of each image. Each image is decoded once, to check it and get its size.

    Raises:
        ValueError: images are broken; the message names all of them.
    """
    records, broken = [], []
    hide = not progress or len(files) < 50
    for name, read, prompt in tqdm(files, desc="check images", unit="image", disable=hide):
        try:
            content = read()
            width, height = decode_image(content, name).size
        except OSError as error:
            broken.append(f"{name} can't be read ({error.strerror}): replace or remove it.")
        except ValueError as error:
            broken.append(str(error))
        else:
            key = hashlib.blake2b(content, digest_size=16).hexdigest()
            records.append(ImageRecord(name, read, (height, width), prompt, key))
    if broken:
        raise ValueError(
            f"{len(broken)} of {len(files)} images can't be used:\n" + "\n".join(broken[:8])
        )
    return records


def trained_on(
    records: Sequence[ImageRecord],
    folder: str | Path,
    prompt: str | None,
    class_images: Sequence[ImageRecord] = (),
    repeats: int = 1,
) -> str:
    """Return a description of the images, with their number and the origin of their captions."""
    prior = "" if repeats == 1 else f", {repeats} times an epoch"
    if class_images:
        number = counted(len(class_images), "image")
        prior += f", and {number} of “{class_images[0].prompt}” for prior preservation"
    captioned = sum(record.prompt != (prompt or "").strip() for record in records)
    images = counted(len(records), "image")
    if not captioned:
        return f"{images} of “{prompt}”{prior}"
    file = "metadata.jsonl" if Path(folder, METADATA_FILE).exists() else ".txt"
    remaining = "" if captioned == len(records) else f", the others as “{prompt}”"
    return f"{images}, {captioned} with captions of their own ({file}){remaining}{prior}"


def with_masks(
    records: Sequence[ImageRecord], folder: str | Path, *, from_alpha: bool = False
) -> list[ImageRecord]:
    """Return the records of the images in `folder`, with their masks.

    Args:
        from_alpha: take the alpha channel of images that have one, but no file in the mask folder.

    Raises:
        ValueError: a mask has another size than its image, or no image, or can't be read; or
            `from_alpha` is set, but there are no masks.
    """
    files: dict[str, Path] = {}
    place = Path(folder) / MASK_FOLDER
    if place.is_dir():
        files = files_of_images(place, [record.name for record in records])
    sources: dict[str, ImageFile] = {}  # by the name of the image
    for record in records:
        file = files.get(Path(record.name).stem)
        if file is not None:
            sources[record.name] = (str(file), file.read_bytes, "")
        elif from_alpha and _upright(record.read).has_transparency_data:
            read = partial(alpha_channel, record.read)
            sources[record.name] = (f"the alpha channel of {record.name}", read, "")
    if from_alpha and not sources:
        raise ValueError(
            f"--alpha_mask is set, but no image in {folder} has an alpha channel: leave it out."
        )
    masks = dict(zip(sources, make_records([*sources.values()]), strict=True))
    masked = [replace(record, mask=masks.get(record.name)) for record in records]
    for record in masked:
        mask = record.mask
        if mask is not None and mask.size != record.size:
            raise ValueError(
                f"{mask.name} is {mask.size[1]} x {mask.size[0]} pixels, but its image {record.size[1]} x "
                f"{record.size[0]}: save both in one size."
            )
    if masks:
        count = counted(len(records), "image")
        logger.info("%s: %d of %s have a mask; the others weigh 1", folder, len(masks), count)
    return masked


def alpha_channel(read: Callable[[], bytes]) -> bytes:
    """Return the alpha channel of the image that `read` returns, as a PNG file."""
    file = io.BytesIO()
    _upright(read).convert("RGBA").getchannel("A").save(file, format="PNG")
    return file.getvalue()


def _upright(read: Callable[[], bytes]) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(io.BytesIO(read())))
