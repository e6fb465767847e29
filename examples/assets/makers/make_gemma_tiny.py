"""Pre-trains gemma-tiny, a DiffusionGemma of 1 M parameters with a canvas of 16 positions.

    python examples/assets/makers/make_gemma_tiny.py                              # half an hour on one CPU core
    python examples/assets/makers/make_gemma_tiny.py --output_dir outputs/trial --max_train_steps 100

It has llada-tiny's tokenizer and questions, and the objective of nara_diffusion/dllm/canvas_loss.py: one canvas after
the prompt, random tokens from the whole vocabulary, self-conditioning in half of the steps, and the encoder's own
next-token loss. A run that was stopped goes on with --resume.

Written to --output_dir: model.safetensors, config.json, the tokenizer, training_curve.csv, results.json; and
training_state.pt, which --resume reads and nobody else needs.
"""

# ruff: noqa: RUF009 (option() is dataclasses.field() with metadata, not a shared default)
from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from make_llada_tiny import Arguments as LladaArguments
from make_llada_tiny import PreTraining
from tiny_text.block_diffusion import CANVAS, build_gemma, save_gemma
from tiny_text.data import exact_match_by_family
from tiny_text.fast_gemma import encoding_once, fast_norms
from tiny_text.tokenizer import build_tokenizer
from tiny_training import option, parse, write_results
from torch import Tensor
from transformers import DiffusionGemmaForBlockDiffusion

from nara_diffusion.dllm.canvas_loss import block_diffusion_loss

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # λ of the card's table


@dataclass
class Arguments(LladaArguments):
    """What the command line sets."""

    output_dir: Path = option(Path("outputs/gemma-tiny"), "folder of the model")
    max_train_steps: int = option(3600, "optimiser steps")
    train_batch_size: int = option(64, "questions a step")
    lr_warmup_steps: int = option(100, "steps of linear warm-up")
    muon: float = option(4e-3, "learning rate of Muon, for the matrices of blocks; 0: AdamW trains all weights")
    validation_steps: int = option(600, "steps between two rows of training_curve.csv")
    checkpointing_steps: int = option(200, "steps between two saved states, each with a usable model beside it")


def canvas_losses(
    model: DiffusionGemmaForBlockDiffusion,
    input_ids: Tensor,
    prompt_lengths: Tensor,
    *,
    seed: int,
    sample_indices: Sequence[int],
    noise_level: float | None,
) -> Tensor:
    """Decoder's and encoder's losses (b,) on rows (b, l) whose answers are padded with end tokens to one canvas."""
    width = int(prompt_lengths.max()) + CANVAS
    end = model.config.text_config.eos_token_id
    input_ids = torch.nn.functional.pad(input_ids, (0, width - input_ids.shape[1]), value=end)
    coin = Random(f"{seed} {sample_indices[0]}").random()
    with encoding_once(model):
        loss = block_diffusion_loss(
            model,
            input_ids,
            prompt_lengths,
            answer_lengths=torch.full_like(prompt_lengths, CANVAS),
            seed=seed,
            sample_indices=sample_indices,
            noise_level=noise_level,
            self_conditioning=float(coin < 0.5),
        )
    return loss.per_sample + loss.encoder_loss


def main(args: Arguments) -> dict:
    """Pre-trains, measures, writes the folder; returns what results.json holds."""
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = build_gemma(tokenizer)
    fast_norms(model)
    training = PreTraining(args, model, tokenizer, canvas_losses, lambda: save_gemma(model, tokenizer, args.output_dir))
    results = {**training.results(), "losses": {str(level): training.validation_loss(level) for level in LEVELS}}
    results["exact_match"] = exact_match_by_family(model, tokenizer, training.held_out, gen_length=CANVAS)
    return write_results(args.output_dir, results, training=training.training.curve)


if __name__ == "__main__":
    print(json.dumps(main(parse(Arguments, __doc__)), indent=2))
