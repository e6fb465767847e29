"""Samples during and after training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.image_processor import VaeImageProcessor
from PIL.Image import Image
from tqdm.auto import tqdm

from nara_diffusion.dreambooth.families.rendering import render
from nara_diffusion.dreambooth.families.table import family_of
from nara_diffusion.training.engine.distributed import split_across_processes
from nara_diffusion.utils.atomic_write import atomic_write_folder

_REMEDY = "use --mixed_precision bf16."
_REMEDIES = {
    "sdxl": "in float16 SDXL's own autoencoder overflows. Use --pretrained_vae_model_name_or_path "
    "madebyollin/sdxl-vae-fp16-fix, or --mixed_precision bf16."
}


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


def sample_images(
    pipe: Any, settings: SampleSettings, accelerator: Accelerator | None = None, desc: str = "sample"
) -> list[Image]:
    """One image for each of `settings.pairs`, made by all processes together.

    Raises:
        ValueError: the pipeline gives NaN.
    """
    show = accelerator is None or accelerator.is_main_process

    def work(indices: Sequence[int]) -> list[Image]:
        images: list[Image] = []
        with tqdm(total=len(indices), desc=desc, unit="image", leave=False, disable=not show) as bar:
            for start in range(0, len(indices), settings.batch_size):
                pairs = [settings.pairs[i] for i in indices[start : start + settings.batch_size]]
                images += sample_batch(pipe, pairs, settings.call)
                bar.update(len(pairs))
        return images

    count = len(settings.pairs)
    return work(range(count)) if accelerator is None else split_across_processes(accelerator, count, work)


def sample_batch(pipe: Any, pairs: Sequence[tuple[str, int]], call: dict[str, Any]) -> list[Image]:
    """The images of (prompt, seed) pairs, in one call; seeds count on the CPU, so they mean the same on any device.

    Raises:
        ValueError: the pipeline gives NaN.
    """
    generators = [torch.Generator().manual_seed(seed) for _, seed in pairs]
    images = render(pipe, [prompt for prompt, _ in pairs], generators, call)  # (b, h, w, 3)
    if not np.isfinite(images).all():
        family = family_of(pipe)
        raise ValueError(
            f"sampling in {getattr(pipe, family.denoiser).dtype} gives NaN: {_REMEDIES.get(family.name, _REMEDY)}"
        )
    return VaeImageProcessor.numpy_to_pil(images)


def image_names(settings: SampleSettings) -> list[str]:
    """The files' names of `write_images`."""
    return [f"{i // settings.images_per_prompt:02d}-seed-{seed}.png" for i, (_, seed) in enumerate(settings.pairs)]


def write_images(folder: Path, images: Sequence[Image], settings: SampleSettings) -> None:
    """PNG files named by prompt and seed, with a metadata.jsonl of their prompts, as `nara-metrics` reads them."""
    lines = []
    with atomic_write_folder(folder) as partial:
        for name, image, (prompt, seed) in zip(image_names(settings), images, settings.pairs, strict=True):
            image.save(partial / name)
            lines.append(json.dumps({"file_name": name, "text": prompt, "seed": seed}, ensure_ascii=False) + "\n")
        (partial / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
