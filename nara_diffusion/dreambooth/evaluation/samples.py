"""Samples of a pipeline, their files, and a sheet of them."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import ImageDraw, ImageFont, ImageOps
from PIL.Image import Image, Resampling, new
from tqdm.auto import tqdm

from nara_diffusion.dreambooth.families.family import Family
from nara_diffusion.dreambooth.families.pipelines import render
from nara_diffusion.training.engines import split_across_processes
from nara_diffusion.utils.atomic_write import atomic_write

CELL, GAP, TEXT = 128, 4, 15  # in pixels: side of the square that an image is shown in, space around it, a line of text


@dataclass(frozen=True)
class SampleSettings:
    """What is sampled.

    Attributes:
        prompts: the texts.
        images_per_prompt: image j of each prompt has the seed `seed` + j.
        batch_size: images at once.
        call: further arguments of the pipeline's call: height, width, num_inference_steps, guidance_scale, …, by these
            names in every family.
    """

    prompts: Sequence[str]
    images_per_prompt: int
    seed: int
    batch_size: int
    call: dict[str, Any]

    @property
    def pairs(self) -> list[tuple[str, int]]:
        """(prompt, seed) of each image, all of one prompt after those of another."""
        return [(prompt, self.seed + j) for prompt in self.prompts for j in range(self.images_per_prompt)]

    @property
    def names(self) -> list[str]:
        """The file's name of each image."""
        return [f"{i // self.images_per_prompt:02d}-seed-{seed}.png" for i, (_, seed) in enumerate(self.pairs)]


def sample_settings(args: Any, captions: Sequence[str], family: Family) -> SampleSettings:
    """Samples of the prompts that `args` name, or of the first four of `captions`, at the training resolution."""
    prompts = args.prompts or list(dict.fromkeys(captions))[:4]
    call = sample_call(args, family)
    return SampleSettings(prompts, args.num_validation_images, args.seed, args.sample_batch_size, call)


def sample_call(args: Any, family: Family) -> dict[str, Any]:
    """`SampleSettings.call` of a run's arguments."""
    return {
        "height": args.resolution,
        "width": args.resolution,
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        **family.sample_call,
    }


def sample_images(
    pipe: Any, settings: SampleSettings, accelerator: Accelerator | None = None, desc: str = "sample"
) -> list[Image]:
    """One image for each of `settings.pairs`, made by all processes together."""
    show = accelerator is None or accelerator.is_main_process

    def sample_batch(pairs: Sequence[tuple[str, int]]) -> list[Image]:
        # seeds count on the CPU, so they mean the same on any device
        generators = [torch.Generator().manual_seed(seed) for _, seed in pairs]
        return render(pipe, [prompt for prompt, _ in pairs], generators, settings.call)

    def work(indices: Sequence[int]) -> list[Image]:
        starts = range(0, len(indices), settings.batch_size)
        batches = [[settings.pairs[i] for i in indices[start : start + settings.batch_size]] for start in starts]
        bar = tqdm(batches, desc=desc, unit="batch", leave=False, disable=not show)
        return [image for pairs in bar for image in sample_batch(pairs)]

    count = len(settings.pairs)
    return work(range(count)) if accelerator is None else split_across_processes(accelerator, count, work)


def write_images(folder: Path, images: Sequence[Image], settings: SampleSettings) -> None:
    """PNG files named by prompt and seed, with a metadata.jsonl of their prompts, as `nara-metrics` reads them."""
    lines = []
    with atomic_write(folder) as partial:
        partial.mkdir(parents=True)
        for name, image, (prompt, seed) in zip(settings.names, images, settings.pairs, strict=True):
            image.save(partial / name)
            lines.append(json.dumps({"file_name": name, "text": prompt, "seed": seed}, ensure_ascii=False) + "\n")
        (partial / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def write_grid(
    path: Path, prompts: Sequence[str], columns: dict[str, Sequence[Image]], references: Sequence[Image] = ()
) -> None:
    """Writes a PNG: images of the subject, then for each prompt its images of each column, beside each other.

    Args:
        path: the file.
        prompts: one for each row, drawn above it with the titles of the columns.
        columns: {title: images}, such as before and after: all of one prompt after those of another, equally many each.
        references: images of the subject, for the row on top.
    """
    rows: list[tuple[str, list[Sequence[Image]]]] = [("training images", [references[:8]])] if references else []
    for number, prompt in enumerate(prompts):
        each = {title: len(images) // len(prompts) for title, images in columns.items()}
        parts = [images[number * each[title] : (number + 1) * each[title]] for title, images in columns.items()]
        rows.append((f"{prompt} ({' | '.join(columns)})", parts))
    step = CELL + GAP
    width = max(sum(map(len, parts)) * step + len(parts) * 4 * GAP for _, parts in rows)
    labels = [textwrap.wrap(label, max(20, width // 8)) for label, _ in rows]
    sheet = new("RGB", (width, sum(len(label) * (TEXT + GAP) + step for label in labels)), "white")
    pen, font, y = ImageDraw.Draw(sheet), ImageFont.load_default(TEXT), 0
    for label, (_, parts) in zip(labels, rows, strict=True):
        for line in label:
            pen.text((GAP, y), line, fill="black", font=font)
            y += TEXT + GAP
        x = 2 * GAP
        for images in parts:
            for image in images:
                sheet.paste(_in_a_cell(image), (x, y))
                x += step
            x += 4 * GAP
        y += step
    with atomic_write(path) as partial:
        sheet.save(partial)


def _in_a_cell(image: Image) -> Image:
    """Small images are enlarged without smoothing, so that their own pixels can be seen."""
    how = Resampling.NEAREST if max(image.size) <= CELL else Resampling.LANCZOS
    return ImageOps.pad(image.convert("RGB"), (CELL, CELL), how, color="white")
