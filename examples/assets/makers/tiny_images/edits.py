"""kontext-tiny's transformer, the edits that it is trained on, and its training: a rectified flow beside a source.

    z_σ = (1 − σ) z + σ ε;   loss = mean over (σ, ε, pairs) of |v_θ(z_σ, s, 1000 σ, prompt) − (ε − z)|²

z are the latents of the edited picture, s those of the source. Sources and prompts are encoded once and kept in memory.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from diffusers import FluxKontextPipeline, FluxTransformer2DModel
from PIL import Image, ImageEnhance, ImageOps
from tiny_drawings.objects import COLOURS
from tiny_drawings.scenes import SIDES, SIZES, Scene, render, scene
from tiny_training import Training
from torch import Tensor
from tqdm import tqdm

from nara_diffusion.dreambooth.flow_families import FLUX_KONTEXT

from .vae import pixels

SPLIT = "edits"
CHUNK = 64
LOGIT_DEVIATION = 1.2
TRAIN_TIMESTEPS = 1000
FAMILY = replace(FLUX_KONTEXT, guidance=None)
_WHERE = {"on the left": "to the left", "": "to the middle", "on the right": "to the right"}
_HOW_LARGE = {"small": "small", "": "medium", "large": "large"}


def recoloured(shown: Scene, rng: random.Random) -> tuple[str, Image.Image]:
    """The thing in another colour."""
    colour = rng.choice([name for name in COLOURS if name not in (shown.colour, shown.accent)])
    return f"make it {colour}", render(replace(shown, colour=colour))


def moved(shown: Scene, rng: random.Random) -> tuple[str, Image.Image]:
    """The thing at another place."""
    side = rng.choice([name for name in SIDES if name != shown.side])
    return f"move it {_WHERE[side]}", render(replace(shown, side=side))


def resized(shown: Scene, rng: random.Random) -> tuple[str, Image.Image]:
    """The thing larger or smaller."""
    size = rng.choice([name for name in SIZES if name != shown.size])
    return f"make it {_HOW_LARGE[size]}", render(replace(shown, size=size))


def turned(shown: Scene, rng: random.Random) -> tuple[str, Image.Image]:
    """The picture upside down."""
    return "turn the picture upside down", ImageOps.flip(render(shown))


def darkened(shown: Scene, rng: random.Random) -> tuple[str, Image.Image]:
    """The picture at half of its brightness."""
    return "darken the picture", ImageEnhance.Brightness(render(shown)).enhance(0.5)


EDITS: dict[Callable[[Scene, random.Random], tuple[str, Image.Image]], float] = {
    recoloured: 0.4,
    moved: 0.25,
    resized: 0.15,
    turned: 0.1,
    darkened: 0.1,
}
"""Edit → its share of the pairs."""


def pair(split: str, seed: int, index: int) -> tuple[Image.Image, str, Image.Image]:
    """The source, prompt and edited picture of that number."""
    shown = scene(split, seed, index)
    rng = random.Random(f"edit-{shown.details}")
    (edit,) = rng.choices(list(EDITS), weights=list(EDITS.values()))
    prompt, edited = edit(shown, rng)
    return render(shown), prompt, edited


@dataclass
class EditLatents:
    """n pairs as the transformer sees them, on the CPU in float16; m distinct prompts of l tokens."""

    sources: Tensor  # (n, 4, 16, 16), shifted and scaled
    means: Tensor  # (n, 4, 16, 16), those of the edited pictures
    deviations: Tensor  # (n, 4, 16, 16), scaled
    numbers: Tensor  # (n,), of the prompts
    prompts: Tensor  # (m, l, d)
    pooled: Tensor  # (m, d_pooled)

    def __len__(self) -> int:
        return len(self.means)


@torch.no_grad()
def encode_edits(pipe: FluxKontextPipeline, split: str, seed: int, count: int) -> EditLatents:
    """The pairs of that split and seed through the pipeline's autoencoder and text encoders."""
    config, rows, prompts = pipe.vae.config, [], {}
    numbers = []
    for start in tqdm(range(0, count, CHUNK), desc="latents"):
        chunk = [pair(split, seed, index) for index in range(start, min(start + CHUNK, count))]
        sources, texts, edited = zip(*chunk, strict=True)
        numbers += [prompts.setdefault(text, len(prompts)) for text in texts]
        with torch.autocast(pipe.device.type, torch.bfloat16):
            of_sources = pipe.vae.encode(pixels(list(sources)).to(pipe.device)).latent_dist.mean
            posterior = pipe.vae.encode(pixels(list(edited)).to(pipe.device)).latent_dist
        means = [(mean - config.shift_factor) * config.scaling_factor for mean in (of_sources, posterior.mean)]
        rows.append((*means, posterior.std * config.scaling_factor))
    columns = [torch.cat(column).cpu().half() for column in zip(*rows, strict=True)]
    states, pooled, _ = pipe.encode_prompt(list(prompts), max_sequence_length=pipe.tokenizer_2.model_max_length)
    return EditLatents(*columns, torch.tensor(numbers), states.cpu().half(), pooled.cpu().half())


def build_edit_transformer(prompt_width: int, pooled_width: int, layers: int, heads: int) -> FluxTransformer2DModel:
    """FLUX.1's arrangement without distilled guidance: joint attention over the prompt, 64 patches and the source's."""
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=layers,
        num_single_layers=layers,
        attention_head_dim=32,
        num_attention_heads=heads,
        joint_attention_dim=prompt_width,
        pooled_projection_dim=pooled_width,
        axes_dims_rope=(8, 12, 12),
    )
    norms = [norm for block in model.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    norms += [block.norm for block in model.single_transformer_blocks]
    for linear in (*(norm.linear for norm in norms), model.norm_out.linear, model.proj_out):
        torch.nn.init.zeros_(linear.weight)  # each block begins as the identity
        torch.nn.init.zeros_(linear.bias)
    return model


class EditMatching:
    """The loss of the transformer on batches of pairs."""

    def __init__(self, latents: EditLatents, held_out: EditLatents):
        self.latents, self.held_out = latents, held_out

    def loss(self, training: Training) -> dict[str, Tensor]:
        """The loss of the present step; its pairs, noise levels and noise follow from its number."""
        generator = training.generator()
        indices = torch.randint(len(self.latents), (training.batch,), generator=generator)
        return {"loss": self._loss(training, self.latents, indices, generator)}

    def validation(self, training: Training) -> dict[str, float]:
        """The loss on held-out pairs, always at the same noise levels and noise."""
        generator = torch.Generator().manual_seed(0)
        indices = torch.arange(len(self.held_out))
        return {"validation_loss": self._loss(training, self.held_out, indices, generator).item()}

    def _loss(self, training: Training, latents: EditLatents, indices: Tensor, generator: torch.Generator) -> Tensor:
        count, device = len(indices), training.device
        means, deviations = latents.means[indices].float(), latents.deviations[indices].float()
        z = means + deviations * torch.randn(means.shape, generator=generator)
        strata = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
        sigmas = torch.sigmoid(LOGIT_DEVIATION * torch.special.ndtri(strata.clamp(1e-5, 1 - 1e-5)))  # (b,)
        noise = torch.randn(z.shape, generator=generator)
        noisy = torch.lerp(z, noise, sigmas[:, None, None, None])
        numbers = latents.numbers[indices]
        embeddings = (latents.prompts[numbers].to(device), latents.pooled[numbers].to(device))
        with training.autocast():
            predicted = FAMILY.predict(
                training.model,
                noisy.to(device),
                sigmas.to(device) * TRAIN_TIMESTEPS,
                torch.zeros(count, 6),
                embeddings,
                [latents.sources[indices].to(device)],
            )
        return (predicted.float() - (noise - z).to(device)).square().mean()
