"""Class images for prior preservation: what the base model shows for the class prompt, made before training.

Image i is made from its own generator, seeded by (seed, i), and lies in `class-{seed}-{i}.png`, with the
prompt in its metadata. So a set that was interrupted is completed by what is missing, several processes share the
work, and the same command makes the same images. A folder that holds enough images already, of whatever origin, is
taken as it is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin
from tqdm.auto import tqdm

from nara_diffusion.dreambooth.families.rendering import render
from nara_diffusion.dreambooth.seeding import torch_generator
from nara_diffusion.utils.atomic_write import atomic_write

from .captions import check_prompt
from .images import image_files

PROMPT_KEY = "class_prompt"


def missing_class_images(folder: str | Path, prompt: str, count: int, *, seed: int) -> list[int]:
    """The numbers of the images that are to be made so that `folder` holds `count`. Makes the folder if it is missing.

    Raises:
        ValueError: an empty prompt, count below 1, a folder that can't be written, or one with images made for
            another prompt.
    """
    prompt = check_prompt(prompt, "class_prompt")
    if count < 1:
        raise ValueError(f"num_class_images is {count}, expected 1 or more.")
    folder = Path(folder)
    present = image_files(folder)[0] if folder.exists() else []
    for path in present:
        made_for = _prompt_of(path)
        if made_for is not None and made_for != prompt:
            raise ValueError(
                f"class_data_dir {folder} holds images made for another prompt: {path.name} shows {made_for!r}, but "
                f"class_prompt is {prompt!r}. Name another folder, or remove them."
            )
    if len(present) < count:
        _check_writable(folder)
    names = {path.name for path in present}
    free = (number for number in range(count + len(present)) if _file_name(seed, number) not in names)
    return [next(free) for _ in range(max(0, count - len(present)))]


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
        make_pipe: loads a text-to-image pipeline, onto its device, for this only; called only if images are missing.
        batch_size: images at once (--sample_batch_size).
        accelerator: accelerate's, if several processes share the work; all of them call this, and leave together.
        call: arguments of the pipeline's call, such as height, width, num_inference_steps.

    Raises:
        ValueError: as `missing_class_images`; the pipeline gives NaN, or the folder can't be written.
    """
    prompt = check_prompt(prompt, "class_prompt")
    numbers = missing_class_images(folder, prompt, count, seed=seed)
    if accelerator is not None:
        accelerator.wait_for_everyone()  # all have counted, before anyone adds
    mine = numbers if accelerator is None else numbers[accelerator.process_index :: accelerator.num_processes]
    if mine:
        paths = {number: Path(folder) / _file_name(seed, number) for number in mine}
        _generate(make_pipe(), paths, prompt, seed=seed, batch_size=batch_size, progress=progress, **call)
    if accelerator is not None:
        accelerator.wait_for_everyone()
    return len(numbers)


def _generate(
    pipe: Any, paths: Mapping[int, Path], prompt: str, *, seed: int, batch_size: int, progress: bool, **call: Any
) -> None:
    numbers = list(paths)
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)  # ours counts images
    with tqdm(total=len(numbers), desc="class images", unit="image", disable=not progress) as bar:
        for start in range(0, len(numbers), batch_size):
            batch = numbers[start : start + batch_size]
            generators = [torch_generator(seed, "class image", number) for number in batch]
            images = render(pipe, [prompt] * len(batch), generators, call)
            _check_finite(images)
            for number, image in zip(batch, images, strict=True):
                _save(paths[number], image, prompt)
            bar.update(len(batch))


def _check_writable(folder: Path) -> None:
    """Makes the folder if it is missing, and sees that a file can be made in it, before a pipeline is loaded."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"class_data_dir {folder} can't be written: {error.strerror}. Name another.") from error


def _file_name(seed: int, number: int) -> str:
    return f"class-{seed}-{number:05d}.png"


def _save(path: Path, image: np.ndarray, prompt: str) -> None:
    """Writes (h, w, 3) in [0, 1], whole or not at all."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(PROMPT_KEY, prompt)
    pixels = (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
    try:
        with atomic_write(path) as partial:
            Image.fromarray(pixels).save(partial, pnginfo=info)
    except OSError as error:
        raise ValueError(f"class image {path} can't be written: {error.strerror or error}.") from error


def _prompt_of(path: Path) -> str | None:
    """The prompt that one of our own images was made for."""
    if path.suffix != ".png" or not path.name.startswith("class-"):
        return None
    try:
        with Image.open(path) as image:
            return image.info.get(PROMPT_KEY)
    except (OSError, ValueError, SyntaxError):
        return None  # what is broken is named when the folder is read


def _check_finite(images: Sequence[np.ndarray]) -> None:
    if not all(np.isfinite(image).all() for image in images):
        raise ValueError(
            "the pipeline gives NaN in place of class images: in float16 SDXL's own autoencoder overflows. Use "
            "--pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix, or --prior_generation_precision bf16."
        )
