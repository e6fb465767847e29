"""What sd-tiny-flow's transformer is trained on: latents and prompt embeddings, computed once and kept in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from tiny_drawings.scenes import render, scenes, training_caption
from torch import Tensor
from tqdm import tqdm

from nara_diffusion.training.output.output_dir import atomic_write

from .vae import pixels

SPLIT = "sd-flow"
CHUNK = 64


@dataclass
class FlowLatents:
    """Scenes as the transformer sees them; n scenes, l tokens, all on the CPU in float16."""

    means: Tensor  # (n, 4, 16, 16), shifted and scaled
    deviations: Tensor  # (n, 4, 16, 16), scaled
    prompts: Tensor  # (n, l, d): the CLIPs' states, without the zeros that stand for an absent T5
    pooled: Tensor  # (n, d_pooled)
    empty_prompt: Tensor  # (l, d), of ""
    empty_pooled: Tensor  # (d_pooled,)

    def __len__(self) -> int:
        return len(self.means)

    def batch(self, indices: Tensor, dropped: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Latents drawn from their posteriors, prompts and pooled prompts; those of ``dropped`` (b,) are of ""."""
        means, deviations = self.means[indices].float(), self.deviations[indices].float()
        latents = means + deviations * torch.randn(means.shape, generator=generator)
        prompts = torch.where(dropped[:, None, None], self.empty_prompt, self.prompts[indices])
        pooled = torch.where(dropped[:, None], self.empty_pooled, self.pooled[indices])
        return latents, prompts.float(), pooled.float()


def cached_flow_latents(pipe: StableDiffusion3Pipeline, split: str, seed: int, count: int, folder: Path) -> FlowLatents:
    """Those of ``encode_flow_scenes``, kept in ``folder`` for a run that goes on later."""
    path = folder / f"latents-{split}-{seed}-{count}.pt"
    if not path.exists():
        latents = encode_flow_scenes(pipe, split, seed, count)
        with atomic_write(path) as partial:
            torch.save(vars(latents), partial)
    return FlowLatents(**torch.load(path, weights_only=True))


@torch.no_grad()
def encode_flow_scenes(pipe: StableDiffusion3Pipeline, split: str, seed: int, count: int) -> FlowLatents:
    """The scenes of that split and seed through the pipeline's autoencoder and text encoders."""
    config, parts = pipe.vae.config, []
    for start in tqdm(range(0, count, CHUNK), desc="latents"):
        shown = scenes(split, seed, min(CHUNK, count - start), start)
        with torch.autocast(pipe.device.type, torch.bfloat16):
            posterior = pipe.vae.encode(pixels([render(scene) for scene in shown]).to(pipe.device)).latent_dist
        mean = (posterior.mean - config.shift_factor) * config.scaling_factor
        parts.append((mean, posterior.std * config.scaling_factor, *_encoded(pipe, map(training_caption, shown))))
    prompt, pooled = _encoded(pipe, [""])
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    return FlowLatents(*(tensor.cpu().half() for tensor in (*columns, prompt[0], pooled[0])))


def _encoded(pipe: StableDiffusion3Pipeline, captions) -> tuple[Tensor, Tensor]:
    """Prompts (n, l, d) and pooled prompts (n, d_pooled), without a place for T5."""
    prompts, _, pooled, _ = pipe.encode_prompt(
        list(captions), None, None, do_classifier_free_guidance=False, max_sequence_length=0
    )
    return prompts, pooled
