"""sd-tiny-flow's transformer, what it is trained on, and its training: rectified flow, as in Stable Diffusion 3.

    z_σ = (1 − σ) z + σ ε;   loss = mean over (σ, ε, z) of |v_θ(z_σ, 1000 σ, prompt) − (ε − z)|²,  logit σ ~ N(0, 1.2²)

A tenth of the prompts is replaced by "", which is what SD3's pipeline gives for an absent negative prompt. The pipeline
pads a prompt with `max_sequence_length` zero vectors where the T5 encoder is absent, 256 by default; so
the steps differ in how many zeros follow the CLIPs' tokens, and the model draws the same with any number of them. The
scenes' latents and prompt embeddings are computed once and kept in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from tiny_drawings.scenes import render, scenes, training_caption
from tiny_training import Training
from torch import Tensor, nn
from tqdm import tqdm

from .vae import pixels

SPLIT = "sd-flow"
CHUNK = 64
DROPPED_SHARE = 0.1
LOGIT_DEVIATION = 1.2
PADDINGS = {0: 0.88, 16: 0.05, 77: 0.05, 256: 0.02}  # zero vectors after the prompt: share of the steps
TRAIN_TIMESTEPS = 1000


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


@torch.no_grad()
def encode_flow_scenes(pipe: StableDiffusion3Pipeline, split: str, seed: int, count: int) -> FlowLatents:
    """The scenes of that split and seed through the pipeline's autoencoder and text encoders."""
    config, parts = pipe.vae.config, []
    for start in tqdm(range(0, count, CHUNK), desc="latents"):
        chunk = scenes(split, seed, min(CHUNK, count - start), start)
        with torch.autocast(pipe.device.type, torch.bfloat16):
            posterior = pipe.vae.encode(pixels([render(scene) for scene in chunk]).to(pipe.device)).latent_dist
        mean = (posterior.mean - config.shift_factor) * config.scaling_factor
        parts.append((mean, posterior.std * config.scaling_factor, *_encoded(pipe, map(training_caption, chunk))))
    prompt, pooled = _encoded(pipe, [""])
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    return FlowLatents(*(tensor.cpu().half() for tensor in (*columns, prompt[0], pooled[0])))


def _encoded(pipe: StableDiffusion3Pipeline, captions) -> tuple[Tensor, Tensor]:
    """Prompts (n, l, d) and pooled prompts (n, d_pooled), without a place for T5."""
    prompts, _, pooled, _ = pipe.encode_prompt(
        list(captions), None, None, do_classifier_free_guidance=False, max_sequence_length=0
    )
    return prompts, pooled


def build_transformer(prompt_width: int, pooled_width: int, layers: int = 4, heads: int = 4) -> SD3Transformer2DModel:
    """2.3 M parameters in SD3.5's arrangement (without its dual attention): joint attention over 64 patches and the
    prompt. Each block begins as the identity, as in DiT."""
    width = 32 * heads
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=heads,
        joint_attention_dim=prompt_width,
        caption_projection_dim=width,
        pooled_projection_dim=pooled_width,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    gates = [norm.linear for block in model.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    for linear in (*gates, model.norm_out.linear, model.proj_out):
        nn.init.zeros_(linear.weight)
    return model


class FlowMatching:
    """The loss of the transformer on batches of ``latents``."""

    def __init__(self, latents: FlowLatents, held_out: FlowLatents):
        self.latents, self.held_out = latents, held_out

    def loss(self, training: Training) -> dict[str, Tensor]:
        """The loss of the present step; its samples, noise levels, dropped prompts and padding follow from its
        number."""
        generator, batch = training.generator(), training.batch
        indices = torch.randint(len(self.latents), (batch,), generator=generator)
        dropped = torch.rand(batch, generator=generator) < DROPPED_SHARE
        shares = torch.tensor(list(PADDINGS.values()))
        padding = list(PADDINGS)[int(torch.multinomial(shares, 1, generator=generator))]
        return {"loss": self._loss(training, self.latents, indices, dropped, padding, generator)}

    def validation(self, training: Training) -> dict[str, float]:
        """The loss on held-out scenes, always at the same noise levels and noise, without padding."""
        generator = torch.Generator().manual_seed(0)
        indices = torch.arange(len(self.held_out))
        dropped = torch.zeros(len(indices), dtype=torch.bool)
        return {"validation_loss": self._loss(training, self.held_out, indices, dropped, 0, generator).item()}

    def _loss(
        self,
        training: Training,
        latents: FlowLatents,
        indices: Tensor,
        dropped: Tensor,
        padding: int,
        generator: torch.Generator,
    ) -> Tensor:
        z, prompts, pooled = latents.batch(indices, dropped, generator)
        prompts = nn.functional.pad(prompts, (0, 0, 0, padding))  # (b, l + padding, d)
        strata = (torch.randperm(len(z), generator=generator) + torch.rand(len(z), generator=generator)) / len(z)
        sigmas = torch.sigmoid(LOGIT_DEVIATION * torch.special.ndtri(strata.clamp(1e-5, 1 - 1e-5)))  # (b,)
        noise = torch.randn(z.shape, generator=generator)
        noisy = torch.lerp(z, noise, sigmas[:, None, None, None])
        device = training.device
        with training.autocast():
            predicted = training.model(
                noisy.to(device),
                encoder_hidden_states=prompts.to(device),
                pooled_projections=pooled.to(device),
                timestep=sigmas.to(device) * TRAIN_TIMESTEPS,
            ).sample
        return (predicted.float() - (noise - z).to(device)).square().mean()
