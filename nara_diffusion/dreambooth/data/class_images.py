"""Class images for prior preservation: what the base model shows for the class prompt, made before training.

Image i is made from its own generator, seeded by (seed, i), and lies in `class-{seed}-{i}.png`, with the prompt in its
metadata. So an interrupted set is completed by what is missing, several processes share the work, and the same command
makes the same images. A folder that holds enough images already, of whatever origin, is taken as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin
from tqdm.auto import tqdm

from nara_diffusion.dreambooth.families.pipelines import render
from nara_diffusion.dreambooth.seeding import torch_generator
from nara_diffusion.utils.atomic_write import atomic_write

from .captions import check_prompt
from .image_records import IMAGE_SUFFIXES

PROMPT_KEY = "class_prompt"


def generate_class_images(
    make_pipe: Callable[[], Any],
    folder: str | Path,
    prompt: str,
    count: int,
    *,
    seed: int,
    batch_size: int = 4,
    accelerator: Any = None,
    progress: bool = True,
    **call: Any,
) -> int:
    """Makes the class images that `folder` lacks; returns how many that were, over all processes.

    Args:
        make_pipe: loads a text-to-image pipeline onto its device; called only if images are missing.
        count: images that are to be there.
        batch_size: images at once.
        accelerator: accelerate's, if several processes share the work; all of them call this, and leave together.
        call: arguments of the pipeline's call, such as height, width, num_inference_steps.

    Raises:
        ValueError: an empty prompt, or a folder with images made for another prompt.
        OSError: the folder can't be written.
    """
    prompt, folder = check_prompt(prompt, "class_prompt"), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    missing = _missing(folder, prompt, count, seed)
    if accelerator is not None:
        accelerator.wait_for_everyone()  # all have counted, before anyone adds
    mine = missing if accelerator is None else missing[accelerator.process_index :: accelerator.num_processes]
    if mine:
        pipe, made_for = make_pipe(), PngImagePlugin.PngInfo()
        made_for.add_itxt(PROMPT_KEY, prompt)
        batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
        for batch in tqdm(batches, desc="class images", unit="batch", disable=not progress):
            generators = [torch_generator(seed, "class image", number) for number in batch]
            for number, image in zip(batch, render(pipe, [prompt] * len(batch), generators, call), strict=True):
                with atomic_write(folder / _file_name(seed, number)) as partial:
                    image.save(partial, pnginfo=made_for)
    if accelerator is not None:
        accelerator.wait_for_everyone()
    return len(missing)


def _missing(folder: Path, prompt: str, count: int, seed: int) -> list[int]:
    """The numbers of the images that are to be made."""
    present = {path.name for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES}
    for name in sorted(name for name in present if name.startswith("class-")):
        with Image.open(folder / name) as image:
            made_for = image.info.get(PROMPT_KEY, prompt)
        if made_for != prompt:
            raise ValueError(
                f"class_data_dir {folder} holds images made for another prompt: {name} shows {made_for!r}, but "
                f"class_prompt is {prompt!r}. Name another folder, or remove them."
            )
    free = [number for number in range(count + len(present)) if _file_name(seed, number) not in present]
    return free[: max(0, count - len(present))]


def _file_name(seed: int, number: int) -> str:
    return f"class-{seed}-{number:05d}.png"
