"""A tiny random SDXL on disk, pictures, the arguments of a run of some seconds on them, and its pipeline."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from nara_diffusion.dreambooth.arguments import DreamBoothArguments

WEIGHTS = "pytorch_nara_weights.safetensors"


def write_pictures(folder: Path, count: int, size: tuple[int, int] = (24, 20), seed: int = 0) -> Path:
    """Pictures (height, width) with blocks of colour, all different."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for number in range(count):
        blocks = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(blocks).resize((size[1], size[0]), Image.Resampling.BICUBIC)
        image.save(folder / f"{number}.png")
    return folder


def fresh_accelerate() -> None:
    """A process has one accelerator; forget it."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def tiny_arguments(model: Path, pictures: Path, output: Path, **changes: Any) -> DreamBoothArguments:
    """Two samples of two prompts, four steps of two images, with crops, flips, dropout and an α other than the rank."""
    values: dict[str, Any] = {
        "pretrained_model_name_or_path": str(model),
        "instance_data_dir": str(pictures),
        "instance_prompt": "a photo of a toy",
        "validation_prompts": ["a photo of a toy", "a red toy, on grass"],
        "output_dir": str(output),
        "resolution": 16,
        "random_flip": True,
        "crops_per_image": 2,
        "rank": 3,
        "lora_alpha": 5.0,
        "core_hidden_dims": [8, 8],
        "train_batch_size": 2,
        "max_train_steps": 4,
        "learning_rate": 1e-2,
        "core_learning_rate": 1e-3,
        "lr_scheduler": "cosine",
        "stratified_timesteps": True,
        "num_validation_images": 2,
        "num_inference_steps": 2,
        "curve_points": 3,
        "logging_steps": 1,
        "validation_steps": None,
        "checkpointing_steps": None,
    }
    return DreamBoothArguments(**{**values, **changes})


def loaded_pipeline(args: DreamBoothArguments, dtype: torch.dtype = torch.float32) -> Any:
    """What a user does."""
    pipe = StableDiffusionXLPipeline.from_pretrained(args.pretrained_model_name_or_path, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_nara_weights(args.output_dir)
    return pipe


def by_the_card(folder: Path) -> Any:
    """A pipeline loaded as the model card says."""
    code = re.search(r"```python\n(.*?)image = pipe", (folder / "README.md").read_text(), re.DOTALL)[1]
    scope: dict[str, Any] = {}
    exec(code, scope)
    scope["pipe"].set_progress_bar_config(disable=True)
    return scope["pipe"]


def run_pixels(pipe: Any, args: DreamBoothArguments) -> list[np.ndarray]:
    """The samples of the run, all in one call, as its report made them."""
    generators = [torch.Generator().manual_seed(args.seed) for _ in args.prompts]
    call = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 5.0}
    return [np.asarray(image) for image in pipe(list(args.prompts), generator=generators, **call).images]


def written(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]


def one_sample(model: Path, pictures: Path, folder: Path) -> Callable[..., DreamBoothArguments]:
    """Makes arguments of a run in `folder` with one sample; keyword arguments change them."""
    return lambda **changes: tiny_arguments(
        model,
        Path(changes.pop("instance_data_dir", pictures)),
        Path(changes.pop("output_dir", folder / "run")),
        **{"validation_prompts": ["a toy"], "num_validation_images": 1, **changes},
    )
