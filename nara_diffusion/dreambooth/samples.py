"""Generate samples and the class images of prior preservation, and write them to files and a sheet."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from tqdm.auto import tqdm

from nara_diffusion.training.engines import split_across_processes
from nara_diffusion.utils.files import atomic_write

from .captions import check_prompt
from .draws import torch_generator
from .families import Family
from .image_arguments import DreamBoothArguments
from .image_records import IMAGE_SUFFIXES, Size
from .pipelines import BY_PIPELINE

CELL, GAP, TITLE = 130, 4, 32  # pixels on a sheet: side of an image, space beside and above it

Made = TypeVar("Made")


@dataclass(frozen=True)
class SampleSettings:
    """The prompts, seeds and arguments of a set of samples."""

    prompts: Sequence[str]
    images_per_prompt: int  # image j of each prompt has the seed `seed` + j
    seed: int
    batch_size: int
    # height, width, num_inference_steps, guidance_scale, …, by these names in every family
    call: dict[str, Any]
    # further arguments for each prompt, such as the image to edit; each image is then made alone
    by_prompt: Sequence[Mapping[str, Any]] = ()

    @property
    def pairs(self) -> list[tuple[str, int]]:
        """(prompt, seed) of each image; the images of a prompt are consecutive."""
        seeds = range(self.seed, self.seed + self.images_per_prompt)
        return list(product(self.prompts, seeds))

    @property
    def names(self) -> list[str]:
        """The file name of each image."""
        count = self.images_per_prompt
        return [f"{i // count:02d}-seed-{seed}.png" for i, (_, seed) in enumerate(self.pairs)]


def sample_call(
    args: DreamBoothArguments, family: Family, size: Size | None = None
) -> dict[str, Any]:
    """Return `SampleSettings.call` of a run, at `size` or else in a square of the resolution."""
    height, width = size or (args.resolution, args.resolution)
    steps = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
    return {"height": height, "width": width, **steps, **family.sample_call}


def render(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    generators: Sequence[torch.Generator],
    call: Mapping[str, Any],
) -> list[Image.Image]:
    """Return one image per prompt. `call` is adjusted to the family of the pipeline, if any."""
    family = BY_PIPELINE.get(type(pipe).__name__)
    options = dict(call) if family is None else family.sampling(dict(call), len(prompts))
    call_pipe: Callable[..., Any] = pipe.__call__  # the base class declares none
    output = call_pipe(prompt=list(prompts), generator=list(generators), **options)
    return output.images if family is None else family.images_of(output)


def sample_images(
    pipe: DiffusionPipeline,
    settings: SampleSettings,
    accelerator: Accelerator | None = None,
    desc: str = "sample",
) -> list[Image.Image]:
    """Return one image for each pair in `settings.pairs`. All processes share the work."""
    batch_size = 1 if settings.by_prompt else settings.batch_size

    def make(indices: Sequence[int]) -> list[Image.Image]:
        pairs = [settings.pairs[i] for i in indices]
        # CPU generators, so that a seed gives the same noise on any device
        generators = [torch.Generator().manual_seed(seed) for _, seed in pairs]
        call = settings.call
        if settings.by_prompt:
            call = {**call, **settings.by_prompt[indices[0] // settings.images_per_prompt]}
        return render(pipe, [prompt for prompt, _ in pairs], generators, call)

    return made_in_batches(make, len(settings.pairs), batch_size, accelerator, desc)


def made_in_batches(
    make: Callable[[Sequence[int]], Iterable[Made]],
    count: int,
    batch_size: int,
    accelerator: Accelerator | None,
    desc: str,
) -> list[Made]:
    """Return what `make` returns for 0 … count − 1. All processes share the work.

    Args:
        make: a function that takes at most `batch_size` indices and returns a result for each.
    """
    show = accelerator is None or accelerator.is_main_process

    def work(indices: Sequence[int]) -> list[Made]:
        starts = range(0, len(indices), batch_size)
        bar = tqdm(starts, desc=desc, unit="batch", leave=False, disable=not show)
        return [item for start in bar for item in make(indices[start : start + batch_size])]

    if accelerator is None:
        return work(range(count))
    return split_across_processes(accelerator, count, work)


def write_images(folder: Path, images: Sequence[Image.Image], settings: SampleSettings) -> None:
    """Write PNG files named by prompt and seed, and a metadata.jsonl with their prompts."""
    lines = []
    with atomic_write(folder) as partial:
        partial.mkdir(parents=True)
        for name, image, (prompt, seed) in zip(settings.names, images, settings.pairs, strict=True):
            image.save(partial / name)
            row = {"file_name": name, "text": prompt, "seed": seed}
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        (partial / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def write_grid(
    path: Path,
    prompts: Sequence[str],
    columns: Mapping[str, Sequence[Image.Image]],
    references: Mapping[str, Sequence[Image.Image]] = MappingProxyType({}),
) -> None:
    """Write a sheet of samples as a PNG file, with images of the subject on top.

    Args:
        prompts: the prompts, one for each row. A row is headed by its prompt and the titles of the
            columns. After each column of several images, a cell is empty.
        columns: {title: images}, for example before and after training. Each column has as many
            images for one prompt as for another, ordered by prompt.
        references: {title: images of the subject} for the rows on top. At most eight are shown.
    """
    rows: list[tuple[str, list[Image.Image | None]]] = [
        (title, [*images[:8]]) for title, images in references.items()
    ]
    for number, prompt in enumerate(prompts):
        cells: list[Image.Image | None] = []
        for images in columns.values():
            count = len(images) // len(prompts)
            cells += [*images[number * count : (number + 1) * count], *[None] * (count > 1)]
        rows.append((f"{prompt} ({' | '.join(columns)})", cells))
    width = max(len(cells) for _, cells in rows)
    size = (width * (CELL + GAP), len(rows) * (CELL + TITLE))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.truetype(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), 11)
    for number, (title, images) in enumerate(rows):
        top = number * (CELL + TITLE)
        lines = textwrap.fill(title, 18 * width, max_lines=2)
        draw.multiline_text((2, top + 2), lines, fill="black", font=font)
        for column, image in enumerate(images):
            if image is not None:
                small = ImageOps.contain(image.convert("RGB"), (CELL, CELL))
                sheet.paste(small, (column * (CELL + GAP), top + TITLE))
    with atomic_write(path) as partial:
        sheet.save(partial, format="png", compress_level=1)  # a third of the time


PROMPT_KEY = "class_prompt"  # in a class image's metadata


def generate_class_images(
    make_pipe: Callable[[], DiffusionPipeline],
    folder: str | Path,
    prompt: str,
    count: int,
    *,
    seed: int,
    batch_size: int = 4,
    accelerator: Accelerator | None = None,
    progress: bool = True,
    **call: Any,
) -> int:
    """Generate the class images that are missing in `folder`, and return their number.

    Image i has its own generator, seeded by (seed, i). It is written to `class-{seed}-{i}.png`,
    with the prompt in the metadata. An interrupted set can thus be completed, several processes can
    share the work, and the same command generates the same images. If the folder already has enough
    images of any origin, nothing is generated.

    Args:
        make_pipe: a function that loads a text-to-image pipeline onto its device. It is called only
            if images are missing.
        count: the number of images that the folder should have.
        batch_size: the number of images in one call.
        accelerator: accelerate's engine, if several processes share the work. All of them call this
            function and return together.
        call: arguments of the pipeline's call, such as height, width, num_inference_steps.

    Returns:
        The number of new images, over all processes.

    Raises:
        ValueError: the prompt is empty, or the folder has images for a different prompt.
    """
    prompt, folder = check_prompt(prompt, "class_prompt"), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    missing = mine = _missing(folder, prompt, count, seed)
    if accelerator is not None:
        accelerator.wait_for_everyone()  # all processes count before any of them adds an image
        mine = missing[accelerator.process_index :: accelerator.num_processes]
    if mine:
        pipe, made_for = make_pipe(), PngImagePlugin.PngInfo()
        made_for.add_itxt(PROMPT_KEY, prompt)
        starts = range(0, len(mine), batch_size)
        for start in tqdm(starts, desc="class images", unit="batch", disable=not progress):
            batch = mine[start : start + batch_size]
            generators = [torch_generator(seed, "class image", number) for number in batch]
            images = render(pipe, [prompt] * len(batch), generators, call)
            for number, image in zip(batch, images, strict=True):
                with atomic_write(folder / _file_name(seed, number)) as partial:
                    image.save(partial, pnginfo=made_for)
    if accelerator is not None:
        accelerator.wait_for_everyone()
    return len(missing)


def _missing(folder: Path, prompt: str, count: int, seed: int) -> list[int]:
    """Return the indices of the images to generate."""
    present = {path.name for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES}
    for name in sorted(name for name in present if name.startswith("class-")):
        with Image.open(folder / name) as image:
            made_for = image.info.get(PROMPT_KEY, prompt)
        if made_for != prompt:
            raise ValueError(
                f"--class_data_dir {folder} has images that were generated for another prompt: {name} shows "
                f"{made_for!r}, but --class_prompt is {prompt!r}. Name another folder, or remove these images."
            )
    free = [i for i in range(count + len(present)) if _file_name(seed, i) not in present]
    return free[: max(0, count - len(present))]


def _file_name(seed: int, number: int) -> str:
    return f"class-{seed}-{number:05d}.png"
