"""Trains sdxl-tiny, the small Stable Diffusion XL that the examples and the default DreamBooth run use.

    python examples/assets/makers/make_sdxl_tiny.py --clip outputs/clip-tiny --clip_smaller outputs/clip-smaller

Two CLIPs of make_clip_tiny.py come first; that file has the commands. Then the autoencoder and its decoder (half an
hour of one CPU core), then the UNet (an hour). A run that was stopped goes on with --resume; until the learning rate of
a part begins to fall, its number of steps may change too.

Written to --output_dir: the folder that StableDiffusionXLPipeline.from_pretrained loads, results.json
and the curves; and training/, which --resume reads and nobody else needs.
"""

# ruff: noqa: RUF009 (option() is dataclasses.field() with metadata, not a shared default)
from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from make_clip_tiny import save_tokenizer
from tiny_images.evaluation import evaluate
from tiny_images.unet import SPLIT, Latents, NoisePrediction, build_scheduler, build_unet, encode_scenes
from tiny_images.vae import build_vae, latent_moments, reconstruction, vae_loss
from tiny_training import Plan, Training, load_as_float32, option, parse, write_results
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, logging


@dataclass
class Arguments:
    """What the command line sets."""

    output_dir: Path = option(Path("outputs/sdxl-tiny"), "folder of the model")
    clip: Path = option(
        Path("outputs/clip-tiny"),
        "folder of clip-tiny, the second text encoder; it measures the samples",
    )
    clip_smaller: Path = option(Path("outputs/clip-smaller"), "folder of the smaller CLIP, the first text encoder")
    vae_steps: int = option(4500, "optimiser steps of the autoencoder")
    decoder_steps: int = option(3500, "further optimiser steps of its decoder")
    vae_batch_size: int = option(4, "scenes a step of the autoencoder")
    vae_learning_rate: float = option(1.5e-3, "of AdamW, after warm-up and before decay")
    unet_steps: int = option(11000, "optimiser steps of the UNet")
    unet_decay_steps: int = option(5000, "the last of them, in which the learning rate falls to zero")
    unet_batch_size: int = option(8, "scenes a step of the UNet")
    unet_late_batch_size: int = option(16, "the same while the learning rate falls")
    unet_learning_rate: float = option(6e-4, "of AdamW, after warm-up and before decay")
    scenes: int = option(16000, "scenes that the UNet learns from")
    held_out: int = option(64, "scenes of the validation loss and of the autoencoder's errors")
    save_steps: int = option(2000, "steps between two saved states, with a usable pipeline beside the UNet's")
    evaluation_batches: int = option(4, "batches of 16 prompts in the final measurement")
    inference_steps: int = option(25, "denoising steps of the samples")
    seed: int = option(0, "of weights, scenes, timesteps and noise")
    device: str = option("cpu", "torch device")
    resume: bool = option(False, "go on from the state in --output_dir")


def train_vae(args: Arguments, vae: AutoencoderKL, name: str, steps: int, learning_rate: float, seed: int) -> Training:
    """The autoencoder, trained or loaded from its finished state."""
    plan = Plan(steps, args.vae_batch_size, learning_rate, ema=0.998, save_steps=args.save_steps)
    training = Training(vae, plan, args.output_dir / "training" / f"{name}.pt", seed, args.device, args.resume)
    training.run(name, vae_loss, lambda: reconstruction(vae, args.held_out))
    training.finish()
    return training


def assemble(args: Arguments, vae: AutoencoderKL) -> StableDiffusionXLPipeline:
    """The pipeline with the trained parts and a fresh UNet, in float32."""
    logging.set_verbosity_error()  # each loads one tower of a CLIP, and would report the other's weights as unexpected
    first = CLIPTextModel.from_pretrained(args.clip_smaller, dtype=torch.float32)
    second = CLIPTextModelWithProjection.from_pretrained(args.clip, dtype=torch.float32)
    torch.manual_seed(args.seed + 1)
    unet = build_unet(first.config.hidden_size + second.config.hidden_size, second.config.projection_dim)
    pipe = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=CLIPTokenizer.from_pretrained(args.clip_smaller),
        tokenizer_2=CLIPTokenizer.from_pretrained(args.clip),
        unet=unet,
        scheduler=build_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    ).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def train_unet(args: Arguments, pipe: StableDiffusionXLPipeline) -> Training:
    """Trains the pipeline's UNet; the pipeline as it stands is written beside each saved state."""
    folder = args.output_dir / "training"
    sizes = {SPLIT: args.scenes, f"{SPLIT}-validation": args.held_out}
    objective = NoisePrediction(*cached_scenes(Latents, encode_scenes, pipe, args.seed, sizes, folder))
    plan = Plan(
        steps=args.unet_steps,
        batch=args.unet_batch_size,
        learning_rate=args.unet_learning_rate,
        decay=args.unet_decay_steps / args.unet_steps,
        late_batch=args.unet_late_batch_size,
        ema=0.999,
        save_steps=args.save_steps,
    )
    training = Training(pipe.unet, plan, folder / "unet.pt", args.seed, args.device, args.resume)
    save = partial(save_pipeline, pipe, args.output_dir, add_watermarker=False)
    training.run("unet", objective.loss, lambda: objective.validation(training), save)
    training.finish()
    return training


def cached_scenes(
    kind: type, encode: Callable[..., Any], pipe: Any, seed: int, sizes: dict[str, int], folder: Path
) -> list[Any]:
    """Scenes of each split, as ``encode`` makes them, kept in ``folder`` for a run that goes on later."""
    latents = []
    for split, count in sizes.items():
        path = folder / f"latents-{split}-{seed}-{count}.pt"
        if not path.exists():
            torch.save(vars(encode(pipe, split, seed, count)), path)
        latents.append(kind(**torch.load(path, weights_only=True)))
    return latents


def save_pipeline(pipe: Any, folder: Path, **options: Any) -> None:
    """Writes a copy in float16; the pipeline itself keeps training."""
    parts: dict[str, Any] = {name: deepcopy(part) for name, part in pipe.components.items()}
    parts = {name: part.half() if isinstance(part, torch.nn.Module) else part for name, part in parts.items()}
    type(pipe)(**parts, **options).save_pretrained(folder)
    for number in ("", "_2"):
        load_as_float32(folder / f"text_encoder{number}")
        tokenizer = parts[f"tokenizer{number}"]
        tokenizer.backend_tokenizer.no_padding()  # what the last prompts were padded and cut to
        tokenizer.backend_tokenizer.no_truncation()
        save_tokenizer(tokenizer, folder / f"tokenizer{number}")


def main(args: Arguments) -> dict:
    """Trains what isn't trained yet, measures, writes the folder; returns what results.json holds."""
    (args.output_dir / "training").mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    vae = build_vae().to(args.device)
    trained = {"vae": train_vae(args, vae, "vae", args.vae_steps, args.vae_learning_rate, args.seed)}
    vae.register_to_config(scaling_factor=round(1 / latent_moments(vae, min(512, args.scenes))[1], 5))
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)  # latents no longer change
    rate = args.vae_learning_rate / 2
    trained["decoder"] = train_vae(args, vae, "decoder", args.decoder_steps, rate, args.seed + 1)
    pipe = assemble(args, vae)
    trained["unet"] = train_unet(args, pipe)

    save_pipeline(pipe, args.output_dir, add_watermarker=False)
    shipped = StableDiffusionXLPipeline.from_pretrained(args.output_dir).to(args.device)
    shipped.set_progress_bar_config(disable=True)
    results = {
        "minutes": {name: round(training.seconds / 60, 1) for name, training in trained.items()},
        "steps": {name: training.step for name, training in trained.items()},
        "parameters": parameters(shipped),
        "seed": args.seed,
        "scenes": args.scenes,
        "scaling_factor": shipped.vae.config.scaling_factor,
        "reconstruction": reconstruction(shipped.vae, args.held_out),
        "validation_loss": trained["unet"].curve[-1]["validation_loss"],
        "samples": evaluate(shipped, args.clip, args.evaluation_batches, args.inference_steps),
    }
    return write_results(args.output_dir, results, **{name: training.curve for name, training in trained.items()})


def parameters(pipe: Any) -> dict[str, int]:
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {name: sum(weight.numel() for weight in part.parameters()) for name, part in parts.items()}


if __name__ == "__main__":
    print(json.dumps(main(parse(Arguments, __doc__)), indent=2))
