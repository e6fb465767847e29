"""Generate images of the subject's class, for prior preservation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from PIL import Image, PngImagePlugin
from tqdm.auto import tqdm

from nara_diffusion.utils.files import atomic_write

from .captions import check_prompt
from .draws import torch_generator
from .image_records import IMAGE_SUFFIXES
from .samples import render

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
    for name in sorted(present):
        if not name.startswith("class-"):
            continue
        with Image.open(folder / name) as image:
            made_for = image.info.get(PROMPT_KEY, prompt)
        if made_for != prompt:
            raise ValueError(
                f"--class_data_dir {folder} has images that were generated for another prompt: {name} shows "
                f"{made_for!r}, but --class_prompt is {prompt!r}. Name another folder, or remove these images."
            )
    free = []
    for number in range(count + len(present)):
        if _file_name(seed, number) not in present:
            free.append(number)
    return free[: max(0, count - len(present))]


def _file_name(seed: int, number: int) -> str:
    return f"class-{seed}-{number:05d}.png"
