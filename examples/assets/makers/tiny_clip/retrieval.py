"""How well clip-tiny knows its captions: retrieval among 64 scenes that it was not trained on."""

from __future__ import annotations

import torch
from tiny_drawings.scenes import Scene, distinct_scenes, render
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor

RETRIEVAL_SIZE = 64
BATCHES = 8
SPLIT, SEED = "retrieval", 2  # no other maker draws from this split


@torch.no_grad()
def similarities(model: CLIPModel, processor: CLIPProcessor, scenes: list[Scene]) -> Tensor:
    """Cosines of each scene's picture (row) with each scene's full caption (column)."""
    inputs = processor(
        text=[scene.caption for scene in scenes],
        images=[render(scene) for scene in scenes],
        padding=True,
        return_tensors="pt",
    ).to(model.device)
    output = model(**inputs)
    return output.image_embeds.float() @ output.text_embeds.float().T


def retrieval(model: CLIPModel, processor: CLIPProcessor, batches: int = BATCHES) -> dict[str, float]:
    """Share of pictures whose own caption is the nearest among 64, and of captions whose own picture is; and the mean
    cosine of a picture with its own caption and with another's."""
    scenes = distinct_scenes(SPLIT, SEED, RETRIEVAL_SIZE * batches)
    sums = torch.zeros(4)
    for first in range(0, len(scenes), RETRIEVAL_SIZE):
        cosines = similarities(model, processor, scenes[first : first + RETRIEVAL_SIZE])
        own = torch.arange(len(cosines), device=cosines.device)
        others = cosines[~torch.eye(len(cosines), dtype=torch.bool, device=cosines.device)]
        found = [(cosines.argmax(dim) == own).float().mean() for dim in (1, 0)]
        sums += torch.stack([*found, cosines.diagonal().mean(), others.mean()]).cpu()
    names = ("image_to_text", "text_to_image", "cosine_own", "cosine_other")
    return dict(zip(names, (sums / batches).tolist(), strict=True))
