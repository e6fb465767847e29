"""Trains sd-tiny-flow, the small Stable Diffusion 3 (rectified flow) that the examples use.

    python examples/assets/makers/make_sd_tiny_flow.py --output_dir outputs/sd-tiny-flow

Autoencoder, text encoders and tokenizers are those of sdxl-tiny; what is trained is the transformer. A run that was
stopped goes on with --resume; until the learning rate begins to fall, its number of steps may change too.

Written to --output_dir: the folder that StableDiffusion3Pipeline.from_pretrained loads, README.md, results.json,
samples.png and the curve; and training/, which --resume reads and nobody else needs.
"""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from make_sdxl_tiny import parameters
from tiny_clip.vocabulary import save_tokenizer
from tiny_images.evaluation import SHEET_PROMPTS, evaluate, sample, write_samples
from tiny_images.flow_card import write_flow_card
from tiny_images.flow_latents import SPLIT, cached_flow_latents
from tiny_images.transformer import FlowMatching, build_flow_scheduler, build_transformer
from tiny_images.vae import latent_moments, pixels
from tiny_training import Plan, Training, load_as_float32, parse
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, logging

WITHOUT_T5 = {"max_sequence_length": 0}  # of the pipeline's call: no zero vectors where T5's would be
ASSETS = Path(__file__).resolve().parents[1]


@dataclass
class Arguments:
    """What the command line sets; --help says what each is."""

    output_dir: Path = Path("outputs/sd-tiny-flow")
    sdxl: Path = ASSETS / "sdxl-tiny"
    clip: Path = ASSETS / "clip-tiny"
    steps: int = 3500
    decay_steps: int = 1100
    batch_size: int = 32
    late_batch_size: int = 32
    learning_rate: float = 1e-3
    muon_learning_rate: float = 3e-3
    layers: int = 4
    heads: int = 4
    shift: float = 1.0
    scenes: int = 8000
    held_out: int = 128
    save_steps: int = 500
    evaluation_batches: int = 4
    inference_steps: int = 25
    seed: int = 0
    device: str = "cpu"
    fp32: bool = False
    resume: bool = False


HELP = {
    "output_dir": "folder of the model",
    "sdxl": "folder of sdxl-tiny: its autoencoder, text encoders and tokenizers are used as they are",
    "clip": "folder of clip-tiny, which measures the samples",
    "steps": "optimiser steps of the transformer",
    "decay_steps": "the last of them, in which the learning rate falls to zero",
    "batch_size": "scenes a step",
    "late_batch_size": "the same while the learning rate falls",
    "learning_rate": "of AdamW, which trains the rest, after warm-up and before decay",
    "muon_learning_rate": "of Muon, which trains the matrices of the blocks; 0 leaves them to AdamW",
    "layers": "blocks of the transformer",
    "heads": "attention heads of 32 channels: the transformer's width is 32 times as many",
    "shift": "of the sampler's noise levels towards noise; training does not depend on it",
    "scenes": "scenes that the transformer learns from",
    "held_out": "scenes of the validation loss",
    "save_steps": "steps between two saved states, with a usable pipeline beside each",
    "evaluation_batches": "batches of 16 prompts in the final measurement",
    "inference_steps": "denoising steps of the samples",
    "seed": "of weights, scenes, noise levels and noise",
    "device": "torch device",
    "fp32": "train without bf16 autocast",
    "resume": "go on from the state in --output_dir",
}


def first_text_encoder(folder: Path) -> CLIPTextModelWithProjection:
    """sdxl-tiny's first text encoder; SD3's pipeline wants a projection, which it lacks: the identity."""
    encoder = CLIPTextModelWithProjection.from_pretrained(folder, dtype=torch.float32)
    torch.nn.init.eye_(encoder.text_projection.weight)
    return encoder


def assemble(args: Arguments) -> StableDiffusion3Pipeline:
    """The pipeline with sdxl-tiny's parts and a fresh transformer, in float32."""
    logging.set_verbosity_error()
    first = first_text_encoder(args.sdxl / "text_encoder")
    second = CLIPTextModelWithProjection.from_pretrained(args.sdxl / "text_encoder_2", dtype=torch.float32)
    vae = AutoencoderKL.from_pretrained(args.sdxl / "vae").eval()
    mean, deviation = latent_moments(vae, min(512, args.scenes))
    vae.register_to_config(shift_factor=round(mean, 5), scaling_factor=round(1 / deviation, 5))
    torch.manual_seed(args.seed)
    transformer = build_transformer(
        first.config.hidden_size + second.config.hidden_size,
        first.config.projection_dim + second.config.projection_dim,
        args.layers,
        args.heads,
    )
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=build_flow_scheduler(args.shift),
        vae=vae,
        text_encoder=first,
        tokenizer=CLIPTokenizer.from_pretrained(args.sdxl / "tokenizer"),
        text_encoder_2=second,
        tokenizer_2=CLIPTokenizer.from_pretrained(args.sdxl / "tokenizer_2"),
        text_encoder_3=None,
        tokenizer_3=None,
    ).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def train_transformer(args: Arguments, pipe: StableDiffusion3Pipeline) -> Training:
    """Trains the pipeline's transformer; the pipeline as it stands is written beside each saved state."""
    folder = args.output_dir / "training"
    sizes = {SPLIT: args.scenes, f"{SPLIT}-validation": args.held_out}
    objective = FlowMatching(
        *(cached_flow_latents(pipe, split, args.seed, count, folder) for split, count in sizes.items())
    )
    plan = Plan(
        steps=args.steps,
        batch=args.batch_size,
        learning_rate=args.learning_rate,
        decay=args.decay_steps / args.steps,
        late_batch=args.late_batch_size,
        ema=0.999,
        muon=args.muon_learning_rate or None,
        save_steps=args.save_steps,
        bf16=not args.fp32,
    )
    training = Training(pipe.transformer, plan, folder / "transformer.pt", args.seed, args.device, args.resume)

    def export() -> None:
        save_pipeline(pipe, args.output_dir)
        write_samples(pipe, args.output_dir, 1, args.inference_steps, **WITHOUT_T5)

    training.run("transformer", objective.loss, lambda: objective.validation(training), export)
    training.finish()
    return training


def save_pipeline(pipe: StableDiffusion3Pipeline, folder: Path) -> None:
    """Writes a copy in float16; the pipeline itself keeps training."""
    parts: dict[str, Any] = {name: deepcopy(part) for name, part in pipe.components.items()}
    parts = {name: part.half() if isinstance(part, torch.nn.Module) else part for name, part in parts.items()}
    StableDiffusion3Pipeline(**parts).save_pretrained(folder)
    for number in ("", "_2"):
        load_as_float32(folder / f"text_encoder{number}")
        tokenizer = parts[f"tokenizer{number}"]
        tokenizer.backend_tokenizer.no_padding()  # what the last prompts were padded and cut to
        tokenizer.backend_tokenizer.no_truncation()
        save_tokenizer(tokenizer, folder / f"tokenizer{number}")


def padding_difference(pipe: StableDiffusion3Pipeline, steps: int) -> float:
    """Mean absolute difference, of a range of 1, of pictures without and with the zero vectors of an absent T5."""
    without, padded = (
        pixels(sample(pipe, list(SHEET_PROMPTS), 0, steps, max_sequence_length=length)) for length in (0, 256)
    )
    return ((without - padded).abs().mean() / 2).item()


def load_pipeline(folder: Path) -> StableDiffusion3Pipeline:
    """The pipeline in ``folder``; Diffusers has to be told that there is no T5."""
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main(args: Arguments) -> dict:
    """Trains, measures, writes the folder; returns what results.json holds."""
    (args.output_dir / "training").mkdir(parents=True, exist_ok=True)
    pipe = assemble(args)
    training = train_transformer(args, pipe)
    save_pipeline(pipe, args.output_dir)
    shipped = load_pipeline(args.output_dir).to(args.device)
    write_samples(shipped, args.output_dir, 4, args.inference_steps, **WITHOUT_T5)
    results = {
        "minutes": round(training.seconds / 60, 1),
        "steps": training.step,
        "parameters": parameters(shipped),
        "seed": args.seed,
        "scenes": args.scenes,
        "scaling_factor": shipped.vae.config.scaling_factor,
        "shift_factor": shipped.vae.config.shift_factor,
        "validation_loss": training.curve[-1]["validation_loss"],
        "padding_difference": padding_difference(shipped, args.inference_steps),
        "samples": evaluate(shipped, args.clip, args.evaluation_batches, args.inference_steps, **WITHOUT_T5),
    }
    write_flow_card(args.output_dir, args, results, training.curve)
    return results


if __name__ == "__main__":
    print(json.dumps(main(parse(Arguments, __doc__ or "", HELP)), indent=2))
