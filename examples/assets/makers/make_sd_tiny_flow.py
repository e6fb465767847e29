"""Trains sd-tiny-flow, the small Stable Diffusion 3 (rectified flow) that the examples use.

    python examples/assets/makers/make_sd_tiny_flow.py --output_dir outputs/sd-tiny-flow

Autoencoder, text encoders and tokenizers are those of sdxl-tiny; what is trained is the transformer. A run that was
stopped goes on with --resume; until the learning rate begins to fall, its number of steps may change too.

Written to --output_dir: the folder that StableDiffusion3Pipeline.from_pretrained loads, results.json,
and the curve; and training/, which --resume reads and nobody else needs.
"""

# ruff: noqa: RUF009 (option() is dataclasses.field() with metadata, not a shared default)
from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from make_sdxl_tiny import cached_scenes, parameters, save_pipeline
from tiny_images.evaluation import evaluate
from tiny_images.transformer import (
    SPLIT,
    TRAIN_TIMESTEPS,
    FlowLatents,
    FlowMatching,
    build_transformer,
    encode_flow_scenes,
)
from tiny_images.vae import latent_moments
from tiny_training import Plan, Training, option, parse, write_results
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, logging

WITHOUT_T5 = {"max_sequence_length": 0}  # of the pipeline's call: no zero vectors where T5's would be
ASSETS = Path(__file__).resolve().parents[1]


@dataclass
class Arguments:
    """What the command line sets."""

    output_dir: Path = option(Path("outputs/sd-tiny-flow"), "folder of the model")
    sdxl: Path = option(ASSETS / "sdxl-tiny", "folder of sdxl-tiny, whose other parts are used as they are")
    clip: Path = option(ASSETS / "clip-tiny", "folder of clip-tiny, which measures the samples")
    steps: int = option(3500, "optimiser steps of the transformer")
    decay_steps: int = option(1100, "the last of them, in which the learning rate falls to zero")
    batch_size: int = option(32, "scenes a step")
    late_batch_size: int = option(32, "the same while the learning rate falls")
    learning_rate: float = option(1e-3, "of AdamW, which trains the rest, after warm-up and before decay")
    muon_learning_rate: float = option(3e-3, "of Muon, which trains the matrices of the blocks; 0 leaves them to AdamW")
    layers: int = option(4, "blocks of the transformer")
    heads: int = option(4, "attention heads of 32 channels: the transformer's width is 32 times as many")
    shift: float = option(1.0, "of the sampler's noise levels towards noise; training does not depend on it")
    scenes: int = option(8000, "scenes that the transformer learns from")
    held_out: int = option(128, "scenes of the validation loss")
    save_steps: int = option(500, "steps between two saved states, with a usable pipeline beside each")
    evaluation_batches: int = option(4, "batches of 16 prompts in the final measurement")
    inference_steps: int = option(25, "denoising steps of the samples")
    seed: int = option(0, "of weights, scenes, noise levels and noise")
    device: str = option("cpu", "torch device")
    resume: bool = option(False, "go on from the state in --output_dir")


def assemble(args: Arguments) -> StableDiffusion3Pipeline:
    """The pipeline with sdxl-tiny's parts and a fresh transformer, in float32."""
    logging.set_verbosity_error()
    first = CLIPTextModelWithProjection.from_pretrained(args.sdxl / "text_encoder", dtype=torch.float32)
    torch.nn.init.eye_(first.text_projection.weight)  # SD3's pipeline wants a projection, which sdxl-tiny's lacks
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
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAIN_TIMESTEPS, shift=args.shift),
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
    objective = FlowMatching(*cached_scenes(FlowLatents, encode_flow_scenes, pipe, args.seed, sizes, folder))
    plan = Plan(
        steps=args.steps,
        batch=args.batch_size,
        learning_rate=args.learning_rate,
        decay=args.decay_steps / args.steps,
        late_batch=args.late_batch_size,
        ema=0.999,
        muon=args.muon_learning_rate or None,
        save_steps=args.save_steps,
    )
    training = Training(pipe.transformer, plan, folder / "transformer.pt", args.seed, args.device, args.resume)
    save = partial(save_pipeline, pipe, args.output_dir)
    training.run("transformer", objective.loss, lambda: objective.validation(training), save)
    training.finish()
    return training


def main(args: Arguments) -> dict:
    """Trains, measures, writes the folder; returns what results.json holds."""
    (args.output_dir / "training").mkdir(parents=True, exist_ok=True)
    pipe = assemble(args)
    training = train_transformer(args, pipe)
    save_pipeline(pipe, args.output_dir)
    absent = {"text_encoder_3": None, "tokenizer_3": None}  # or Diffusers looks for a T5
    shipped = StableDiffusion3Pipeline.from_pretrained(args.output_dir, **absent).to(args.device)
    shipped.set_progress_bar_config(disable=True)
    results = {
        "minutes": round(training.seconds / 60, 1),
        "steps": training.step,
        "parameters": parameters(shipped),
        "seed": args.seed,
        "scenes": args.scenes,
        "scaling_factor": shipped.vae.config.scaling_factor,
        "shift_factor": shipped.vae.config.shift_factor,
        "validation_loss": training.curve[-1]["validation_loss"],
        "samples": evaluate(shipped, args.clip, args.evaluation_batches, args.inference_steps, **WITHOUT_T5),
    }
    return write_results(args.output_dir, results, transformer=training.curve)


if __name__ == "__main__":
    print(json.dumps(main(parse(Arguments, __doc__)), indent=2))
