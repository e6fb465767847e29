"""sdxl-tiny's UNet, what it is trained on, and its training: noise prediction, conditioned as in SDXL.

    loss = mean over (t, ε, z) of  min(SNR(t), 5) / SNR(t) · |ε − ε_θ(√ᾱ_t z + √(1 − ᾱ_t) ε, t, prompt, time ids)|²

A tenth of the prompts is replaced by zeros, which is what SDXL's pipeline gives for an absent negative prompt. The
scenes' latents and prompt embeddings are computed once and kept in memory.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from tiny_drawings.scenes import SIZE, render, scenes, training_caption
from tiny_training import Training
from torch import Tensor
from tqdm import tqdm

from .vae import pixels

SPLIT = "sdxl"
CROPPED_SHARE = 0.3  # of the scenes: cut from a larger picture, as SDXL's time_ids tell
LARGER_SIZES = (72, 80, 96)
CHUNK = 64
DROPPED_SHARE = 0.1
SNR_BOUND = 5.0


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


@torch.no_grad()
def encode_scenes(pipe: StableDiffusionXLPipeline, split: str, seed: int, count: int) -> Latents:
    """The scenes of that split and seed through the pipeline's autoencoder and text encoders."""
    parts: list[tuple[Tensor, ...]] = []
    for start in tqdm(range(0, count, CHUNK), desc="latents"):
        chunk = scenes(split, seed, min(CHUNK, count - start), start)
        cuts = [_cut(scene.details) for scene in chunk]
        images = [
            render(scene, size).crop((left, top, left + SIZE, top + SIZE))
            for scene, (size, top, left) in zip(chunk, cuts, strict=True)
        ]
        with torch.autocast(pipe.device.type, torch.bfloat16):
            posterior = pipe.vae.encode(pixels(images).to(pipe.device)).latent_dist
        prompts, _, pooled, _ = pipe.encode_prompt(
            [training_caption(scene) for scene in chunk], do_classifier_free_guidance=False
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


def build_unet(prompt_width: int, pooled_width: int) -> UNet2DConditionModel:
    """4.4 M parameters in SDXL's arrangement: text_time conditioning, attention at two of three resolutions."""
    channels, time_width = (64, 80, 112), 16
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=16,
        attention_head_dim=tuple(width // 16 for width in channels),  # diffusers' name for the number of heads
        transformer_layers_per_block=1,
        use_linear_projection=True,
        cross_attention_dim=prompt_width,
        addition_embed_type="text_time",
        addition_time_embed_dim=time_width,
        projection_class_embeddings_input_dim=pooled_width + 6 * time_width,
    )


def build_scheduler() -> EulerDiscreteScheduler:
    """SDXL's own settings."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        steps_offset=1,
        timestep_spacing="leading",
    )


class NoisePrediction:
    """The loss of the UNet on batches of ``latents``."""

    def __init__(self, latents: Latents, held_out: Latents):
        self.latents, self.held_out = latents, held_out
        self.schedule = DDPMScheduler.from_config(build_scheduler().config)

    def loss(self, training: Training) -> dict[str, Tensor]:
        """The loss of the present step; its samples, timesteps, noise and dropped prompts follow from its number."""
        generator, batch = training.generator(), training.batch
        indices = torch.randint(len(self.latents), (batch,), generator=generator)
        dropped = torch.rand(batch, generator=generator) < DROPPED_SHARE
        return {"loss": self._loss(training, self.latents, indices, dropped, generator)}

    def validation(self, training: Training) -> dict[str, float]:
        """The loss on held-out scenes, always at the same timesteps and noise."""
        generator = torch.Generator().manual_seed(0)
        indices = torch.arange(len(self.held_out))
        dropped = torch.zeros(len(indices), dtype=torch.bool)
        return {"validation_loss": self._loss(training, self.held_out, indices, dropped, generator).item()}

    def _loss(
        self, training: Training, latents: Latents, indices: Tensor, dropped: Tensor, generator: torch.Generator
    ) -> Tensor:
        z, prompts, added = latents.batch(indices, generator)
        prompts[dropped], added["text_embeds"][dropped] = 0, 0
        strata = (torch.randperm(len(z), generator=generator) + torch.rand(len(z), generator=generator)) / len(z)
        timesteps = (strata * self.schedule.config.num_train_timesteps).long()
        noise = torch.randn(z.shape, generator=generator)
        noisy = self.schedule.add_noise(z, noise, timesteps)
        weights = compute_snr(self.schedule, timesteps)
        weights = weights.clamp(max=SNR_BOUND) / weights
        device = training.device
        added = {name: value.to(device) for name, value in added.items()}
        with training.autocast():
            predicted = training.model(
                noisy.to(device), timesteps.to(device), prompts.to(device), added_cond_kwargs=added
            ).sample
        errors = (predicted.float() - noise.to(device)).square().mean(dim=(1, 2, 3))
        return (weights.to(device) * errors).mean()
