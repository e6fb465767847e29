"""The small SDXL that comes with the project, as the examples use it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

ASSETS = Path(__file__).parent / "assets"
# attention alone is what one adapts in the large SDXL; so small a model learns more with all its layers
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2"]
SEEDS = [0, 1]


def load_pipeline(model: str | Path) -> StableDiffusionXLPipeline:
    """The shipped model, stored in float16, in the float32 that CPUs are fast in."""
    pipe = StableDiffusionXLPipeline.from_pretrained(model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def optimizer_of(unet: Any, learning_rate: float, core_learning_rate: float, steps: int) -> tuple[Any, Any]:
    """AdamW for what is trained, with smaller steps for the core than for A and B, and its cosine schedule."""
    trained = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    core = [p for name, p in trained.items() if "lora_core." in name]
    factors = [p for name, p in trained.items() if "lora_core." not in name]
    groups = [{"params": factors, "lr": learning_rate}, {"params": core, "lr": core_learning_rate}]
    optimizer = torch.optim.AdamW(groups)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)


def sample(pipe: Any, prompts: Sequence[str], steps: int, guidance: float) -> list[Image.Image]:
    """An image of each prompt and seed, those of one prompt after those of another."""
    images = []
    for prompt in prompts:
        generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
        call = {"num_images_per_prompt": len(SEEDS), "num_inference_steps": steps, "guidance_scale": guidance}
        images += pipe(prompt, generator=generators, **call).images
    return images
