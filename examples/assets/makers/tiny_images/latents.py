"""What sdxl-tiny's UNet is trained on: the scenes' latents and prompt embeddings, computed once and kept in memory."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from tiny_drawings.scenes import SIZE, crop_of, scenes, training_caption
from torch import Tensor
from tqdm import tqdm

from nara_diffusion.training.output.output_dir import atomic_write

from .vae import pixels

SPLIT = "sdxl"
CROPPED_SHARE = 0.3  # of the scenes: cut from a larger picture, as SDXL's time_ids tell
LARGER_SIZES = (72, 80, 96)
CHUNK = 64


@dataclass
class Latents:
    """Scenes as the UNet sees them; n scenes, l tokens, all on the CPU in float16 but the time ids."""

    means: Tensor  # (n, 4, 16, 16), scaled
    deviations: Tensor  # (n, 4, 16, 16), scaled
    prompts: Tensor  # (n, l, d)
    pooled: Tensor  # (n, d_pooled)
    time_ids: Tensor  # (n, 6): original height and width, crop's top and left, target height and width

    def __len__(self) -> int:
        return len(self.means)

    def batch(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Latents drawn from their posteriors, prompt embeddings, and what ``added_cond_kwargs`` takes."""
        means, deviations = self.means[indices].float(), self.deviations[indices].float()
        latents = means + deviations * torch.randn(means.shape, generator=generator)
        added = {"text_embeds": self.pooled[indices].float(), "time_ids": self.time_ids[indices].float()}
        return latents, self.prompts[indices].float(), added


def cached_latents(pipe: StableDiffusionXLPipeline, split: str, seed: int, count: int, folder: Path) -> Latents:
    """Those of ``encode_scenes``, kept in ``folder`` for a run that goes on later."""
    path = folder / f"latents-{split}-{seed}-{count}.pt"
    if not path.exists():
        latents = encode_scenes(pipe, split, seed, count)
        with atomic_write(path) as partial:
            torch.save(vars(latents), partial)
    return Latents(**torch.load(path, weights_only=True))


@torch.no_grad()
def encode_scenes(pipe: StableDiffusionXLPipeline, split: str, seed: int, count: int) -> Latents:
    """The scenes of that split and seed through the pipeline's autoencoder and text encoders."""
    parts: list[tuple[Tensor, ...]] = []
    for start in tqdm(range(0, count, CHUNK), desc="latents"):
        shown = scenes(split, seed, min(CHUNK, count - start), start)
        cuts = [_cut(scene.details) for scene in shown]
        images = [crop_of(scene, *cut) for scene, cut in zip(shown, cuts, strict=True)]
        with torch.autocast(pipe.device.type, torch.bfloat16):
            posterior = pipe.vae.encode(pixels(images).to(pipe.device)).latent_dist
        prompts, _, pooled, _ = pipe.encode_prompt(
            [training_caption(scene) for scene in shown], do_classifier_free_guidance=False
        )
        scale = pipe.vae.config.scaling_factor
        parts.append(
            (
                posterior.mean * scale,
                posterior.std * scale,
                prompts,
                pooled,
                torch.tensor([(size, size, top, left, SIZE, SIZE) for size, top, left in cuts]),
            )
        )
    *halves, time_ids = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    return Latents(*(tensor.half() for tensor in halves), time_ids)


def _cut(details: str) -> tuple[int, int, int]:
    """(size, top, left): the picture's side, and the corner of the window that is cut from it."""
    rng = random.Random(f"cut-{details}")
    if rng.random() >= CROPPED_SHARE:
        return SIZE, 0, 0
    size = rng.choice(LARGER_SIZES)
    return size, rng.randint(0, size - SIZE), rng.randint(0, size - SIZE)
