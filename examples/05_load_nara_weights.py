"""Stable Diffusion XL with a NaRA adapter: load it, sample at several strengths, take it out again.

    python examples/05_load_nara_weights.py

After `import nara_diffusion` every Diffusers pipeline has load_nara_weights, save_nara_weights and unload_nara_weights,
and what Diffusers offers after loading a LoRA (set_adapters, delete_adapters, disable_lora, …) works on NaRA too. λ
needs no care: the adapter reads it from each step's timestep. Without --weights, a plain training loop on the five
pictures of assets/subject makes an adapter first; `accelerate launch train_scripts/dreambooth_sdxl.py` makes a better
one, whose output folder --weights takes. The picture shows each prompt at three strengths. Takes under a minute.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from shipped_images import ASSETS, LAYERS, load_pipeline, optimizer_of, sample
from tqdm.auto import tqdm

from nara_diffusion import NaraConfig
from nara_diffusion.dreambooth import load_image
from nara_diffusion.dreambooth.objectives import build_objective, squared_errors
from nara_diffusion.dreambooth.samples import write_grid

INSTANCE_PROMPT = "a photo of sks toy"
PROMPTS = [INSTANCE_PROMPT, "a photo of sks toy in the snow", "a photo of sks toy on the beach"]
STRENGTHS = [0.0, 0.5, 1.0]


def subject_images() -> list[Image.Image]:
    return [load_image(file) for file in sorted((ASSETS / "subject").glob("*.png"))]


@torch.no_grad()
def what_the_unet_reads(pipe: Any, images: list[Image.Image], prompt: str) -> tuple[torch.Tensor, dict[str, Any]]:
    """Latents (b, c, h, w) of the images, and the UNet's other inputs: prompt and sizes, the same for each image."""
    side = pipe.default_sample_size * pipe.vae_scale_factor  # pixels
    pixels = pipe.image_processor.preprocess(images, height=side, width=side)  # (b, 3, h, w) in [-1, 1]
    latents = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
    embeddings, _, pooled, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)  # (1, l, d), (1, e)
    count = len(images)
    sizes = torch.tensor([[side, side, 0, 0, side, side]] * count, dtype=pixels.dtype)  # original, crop, target
    conditions = {"text_embeds": pooled.repeat(count, 1), "time_ids": sizes}
    return latents, {"encoder_hidden_states": embeddings.repeat(count, 1, 1), "added_cond_kwargs": conditions}


def train(pipe: Any, steps: int, folder: Path) -> None:
    """A plain loop: noise at a random timestep for each image, the UNet's error, AdamW. Saves the adapter."""
    latents, conditions = what_the_unet_reads(pipe, subject_images(), INSTANCE_PROMPT)
    objective = build_objective(pipe.scheduler)  # what this model learns: ε, v or x, at the timesteps of its schedule
    config = NaraConfig(r=8, lora_alpha=8, target_modules=LAYERS, core_hidden_dims=(64, 64))
    pipe.unet.requires_grad_(False)
    pipe.unet.add_adapter(config, adapter_name="default")
    optimizer, schedule = optimizer_of(pipe.unet, 3e-3, 1e-3, steps)
    pipe.unet.train()
    for _ in (bar := tqdm(range(steps), desc="train")):
        timesteps = torch.randint(objective.levels, (len(latents),))  # one λ for each image
        batch = objective.corrupt(latents, torch.randn_like(latents), timesteps)
        prediction = pipe.unet(batch.model_input, batch.timestep, **conditions).sample
        loss = squared_errors(prediction, batch).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    pipe.unet.eval()
    pipe.save_nara_weights(folder, adapter_name="default")


def main(
    weights: str | Path | None = None,
    model: str | Path = ASSETS / "sdxl-tiny",
    steps: int = 220,
    sample_steps: int = 25,
    output_dir: str | Path = "outputs/examples",
) -> dict[float, list[Image.Image]]:
    """Returns the images of each strength; the picture of them lies in `output_dir`."""
    torch.manual_seed(0)
    folder = Path(output_dir) / "05_load_nara_weights"
    if weights is None:
        train(load_pipeline(model), steps, folder)
        weights = folder

    pipe = load_pipeline(model)
    base = sample(pipe, PROMPTS, sample_steps, guidance=4.0)
    pipe.load_nara_weights(weights, adapter_name="subject")  # a file, a folder, or a repository on the Hub
    print(f"active adapters: {pipe.get_active_adapters()}")
    columns = {}
    for strength in tqdm(STRENGTHS, desc="sample"):
        pipe.set_adapters("subject", strength)
        columns[strength] = sample(pipe, PROMPTS, sample_steps, guidance=4.0)
    pipe.unload_nara_weights()
    unloaded = sample(pipe, PROMPTS, sample_steps, guidance=4.0)
    same = all(
        image.tobytes() == unloaded_image.tobytes() for image, unloaded_image in zip(base, unloaded, strict=True)
    )
    print(f"unloaded, it gives the base's pixels again: {same}")

    picture = folder.with_suffix(".png")
    picture.parent.mkdir(parents=True, exist_ok=True)
    titles = {f"strength {strength:g}": images for strength, images in columns.items()}
    write_grid(picture, PROMPTS, titles, references={"training images": subject_images()})
    print(f"drawn in {picture}")
    return columns


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Load a NaRA adapter into Stable Diffusion XL and sample with it.")
    parser.add_argument("--weights", help="a trained adapter: file, folder or repository (default: trains one)")
    parser.add_argument("--model", default=ASSETS / "sdxl-tiny", help="folder of SDXL (default: the shipped sdxl-tiny)")
    parser.add_argument("--steps", type=int, default=220, help="train steps of the adapter (default: 220)")
    parser.add_argument("--sample_steps", type=int, default=25, help="steps of sampling an image (default: 25)")
    parser.add_argument("--output_dir", default="outputs/examples", help="where adapter and picture go")
    main(**vars(parser.parse_args()))
