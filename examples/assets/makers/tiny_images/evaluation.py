"""Whether sdxl-tiny or sd-tiny-flow draws what its prompts say, as clip-tiny sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tiny_drawings.scenes import distinct_scenes, render
from transformers import CLIPModel, CLIPProcessor

SPLIT, SEED = "evaluation", 3
GUIDANCE = 4.0
BATCH = 16


@torch.no_grad()
def evaluate(pipe: Any, clip_folder: Path, batches: int, steps: int, **options: Any) -> dict[str, float]:
    """Cosine of a sample and its prompt, beside that of the renderer's own picture of it (what a perfect model could
    reach) and of a sample and another's prompt; and how often a sample's own prompt is the nearest of all."""
    model = CLIPModel.from_pretrained(clip_folder, dtype=torch.float32).eval()
    processor = CLIPProcessor.from_pretrained(clip_folder)
    scenes = distinct_scenes(SPLIT, SEED, BATCH * batches)
    captions = [scene.caption for scene in scenes]
    images = []
    options |= {"num_inference_steps": steps, "guidance_scale": GUIDANCE}
    for number in range(batches):
        generators = [torch.Generator().manual_seed(number * 1000 + index) for index in range(BATCH)]
        images += pipe(captions[number * BATCH : (number + 1) * BATCH], generator=generators, **options).images
    sampled = _cosines(model, processor, images, captions)
    rendered = _cosines(model, processor, [render(scene) for scene in scenes], captions)
    indices = torch.arange(len(scenes))
    return {
        "prompts": len(scenes),
        "text_alignment": sampled.diagonal().mean().item(),
        "text_alignment_of_renderings": rendered.diagonal().mean().item(),
        "text_alignment_with_other_prompts": sampled[~torch.eye(len(indices), dtype=torch.bool)].mean().item(),
        "own_prompt_is_nearest": (sampled.argmax(1) == indices).float().mean().item(),
        "own_prompt_is_nearest_of_renderings": (rendered.argmax(1) == indices).float().mean().item(),
    }


def _cosines(
    model: CLIPModel, processor: CLIPProcessor, images: list[Image.Image], captions: list[str]
) -> torch.Tensor:
    output = model(**processor(text=captions, images=images, padding=True, return_tensors="pt"))
    return output.image_embeds @ output.text_embeds.T
