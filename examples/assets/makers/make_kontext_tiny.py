"""Trains kontext-tiny, the small FLUX.1 Kontext (a rectified flow that edits pictures) that the examples use.

    python examples/assets/makers/make_kontext_tiny.py --output_dir outputs/kontext-tiny

The autoencoder is sd-tiny-flow's, the CLIP and its tokenizer sdxl-tiny's first; T5 has random weights, which
tells words apart. What is trained is the transformer. A run that was stopped goes on with --resume; until the learning
rate begins to fall, its number of steps may change too.

Written to --output_dir: the folder that FluxKontextPipeline.from_pretrained loads, samples.png, results.json, and the
curve; and training/, which --resume reads and nobody else needs.
"""

# ruff: noqa: RUF009 (option() is dataclasses.field() with metadata, not a shared default)
from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxKontextPipeline
from make_sdxl_tiny import cached_scenes, parameters, save_pipeline
from tiny_images.edits import (
    SPLIT,
    TRAIN_TIMESTEPS,
    EditLatents,
    EditMatching,
    build_edit_transformer,
    encode_edits,
    pair,
)
from tiny_training import Plan, Training, option, parse, write_results
from transformers import CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer, logging

from nara_diffusion.dreambooth.samples import write_grid

ASSETS = Path(__file__).resolve().parents[1]
TOKENS = 10  # of a prompt
WORDS = """a and background balloon ball black blue boat brown car cartoon change colour cup darken fish flip flower for
    frame from green grey house in invert it its large left lighten make medium middle mirror mushroom move of on orange
    photo picture pink purple red remove replace right sks small star swap the thing to toy tree turn upside down white
    with yellow zoom"""


@dataclass
class Arguments:
    """What the command line sets."""

    output_dir: Path = option(Path("outputs/kontext-tiny"), "folder of the model")
    sdxl: Path = option(ASSETS / "sdxl-tiny", "folder of sdxl-tiny, whose first text encoder is used")
    flow: Path = option(ASSETS / "sd-tiny-flow", "folder of sd-tiny-flow, whose autoencoder is used")
    steps: int = option(2700, "optimiser steps of the transformer")
    decay_steps: int = option(700, "the last of them, in which the learning rate falls to zero")
    batch_size: int = option(16, "pairs a step")
    learning_rate: float = option(1e-3, "of AdamW, which trains the rest, after warm-up and before decay")
    muon_learning_rate: float = option(3e-3, "of Muon, which trains the matrices of the blocks; 0 leaves them to AdamW")
    layers: int = option(2, "blocks of either kind in the transformer")
    heads: int = option(4, "attention heads of 32 channels: the transformer's width is 32 times as many")
    pairs: int = option(4000, "pairs that the transformer learns from")
    held_out: int = option(128, "pairs of the validation loss")
    save_steps: int = option(500, "steps between two saved states, with a usable pipeline beside each")
    seed: int = option(0, "of weights, pairs, noise levels and noise")
    device: str = option("cpu", "torch device")
    resume: bool = option(False, "go on from the state in --output_dir")


def assemble(args: Arguments) -> FluxKontextPipeline:
    """The pipeline with the other models' parts and a fresh transformer, in float32."""
    logging.set_verbosity_error()
    clip = CLIPTextModel.from_pretrained(args.sdxl / "text_encoder", dtype=torch.float32)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -9.0)]
    pieces += [(f"▁{word}", -3.0) for word in WORDS.split()]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TOKENS)
    torch.manual_seed(args.seed)
    config = T5Config(vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4)
    t5 = T5EncoderModel(config).eval()
    transformer = build_edit_transformer(config.d_model, clip.config.hidden_size, args.layers, args.heads)
    pipe = FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAIN_TIMESTEPS),
        vae=AutoencoderKL.from_pretrained(args.flow / "vae", dtype=torch.float32).eval(),
        text_encoder=clip,
        tokenizer=CLIPTokenizer.from_pretrained(args.sdxl / "tokenizer"),
        text_encoder_2=t5,
        tokenizer_2=tokenizer,
        transformer=transformer,
    ).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def train_transformer(args: Arguments, pipe: FluxKontextPipeline) -> Training:
    """Trains the pipeline's transformer; the pipeline as it stands is written beside each saved state."""
    folder = args.output_dir / "training"
    sizes = {SPLIT: args.pairs, f"{SPLIT}-validation": args.held_out}
    objective = EditMatching(*cached_scenes(EditLatents, encode_edits, pipe, args.seed, sizes, folder))
    plan = Plan(
        steps=args.steps,
        batch=args.batch_size,
        learning_rate=args.learning_rate,
        decay=args.decay_steps / args.steps,
        ema=0.999,
        muon=args.muon_learning_rate or None,
        save_steps=args.save_steps,
    )
    training = Training(pipe.transformer, plan, folder / "transformer.pt", args.seed, args.device, args.resume)
    save = partial(save_pipeline, pipe, args.output_dir)
    training.run("transformer", objective.loss, lambda: objective.validation(training), save)
    training.finish()
    return training


def draw_samples(pipe: FluxKontextPipeline, path: Path, count: int = 6) -> None:
    """Writes a sheet of held-out sources, their edits by the pipeline, and the renderer's own edits."""
    drawn = [pair(f"{SPLIT}-samples", 0, index) for index in range(count)]
    sources, prompts, targets = zip(*drawn, strict=True)
    images = pipe(
        image=list(sources),
        prompt=list(prompts),
        height=64,
        width=64,
        num_inference_steps=25,
        max_sequence_length=TOKENS,
        generator=[torch.Generator().manual_seed(index) for index in range(count)],
        max_area=64 * 64,
        _auto_resize=False,
    ).images
    write_grid(path, prompts, {"source": sources, "edited": images, "target": targets})


def main(args: Arguments) -> dict:
    """Trains, writes the folder; returns what results.json holds."""
    (args.output_dir / "training").mkdir(parents=True, exist_ok=True)
    pipe = assemble(args)
    training = train_transformer(args, pipe)
    save_pipeline(pipe, args.output_dir)
    draw_samples(pipe, args.output_dir / "samples.png")
    results = {
        "minutes": round(training.seconds / 60, 1),
        "steps": training.step,
        "parameters": parameters(pipe),
        "seed": args.seed,
        "pairs": args.pairs,
        "validation_loss": training.curve[-1]["validation_loss"],
    }
    return write_results(args.output_dir, results, transformer=training.curve)


if __name__ == "__main__":
    print(json.dumps(main(parse(Arguments, __doc__)), indent=2))
