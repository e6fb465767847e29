"""Pre-trains llada2-tiny, a LLaDA2 of 1 M parameters with blocks of 16 positions; or sdar-tiny, with blocks of 4.

    python examples/assets/makers/make_llada2_tiny.py                              # ten minutes on one CPU core
    python examples/assets/makers/make_llada2_tiny.py --output_dir outputs/trial --max_train_steps 100
    python examples/assets/makers/make_llada2_tiny.py --family sdar --output_dir outputs/sdar-tiny

Both have llada-tiny's tokenizer and questions, and the objective of nara_diffusion/dllm/loss.py for attention by
blocks. (llada2-tiny's shipped weights had one masked block of each answer a step.) A run that was stopped goes on with
--resume.

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
from make_llada_tiny import PreTraining, masked_losses
from tiny_text.block_models import build_block_model, config_fields, save_block_model
from tiny_text.data import exact_match_by_family
from tiny_text.tokenizer import build_tokenizer
from tiny_training import option, parse, write_results
from torch import Tensor
from transformers import PreTrainedModel

GEN_LENGTH = 16  # tokens of an answer, a multiple of both block lengths
NEXT_BLOCK = 0.125  # share of the steps with answers that are padded to the end of one more block
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # λ of the card's table


@dataclass
class Arguments(LladaArguments):
    """What the command line sets."""

    output_dir: Path = option(Path("outputs/llada2-tiny"), "folder of the model")
    family: str = option("llada2", "llada2 or sdar")
    max_train_steps: int = option(2000, "optimiser steps")
    train_batch_size: int = option(64, "questions a step")
    lr_warmup_steps: int = option(100, "steps of linear warm-up")
    muon: float = option(4e-3, "learning rate of Muon, for the matrices of blocks; 0: AdamW trains all weights")
    validation_steps: int = option(250, "steps between two rows of training_curve.csv")
    checkpointing_steps: int = option(200, "steps between two saved states, each with a usable model beside it")


def block_losses(
    model: PreTrainedModel,
    input_ids: Tensor,
    prompt_lengths: Tensor,
    *,
    seed: int,
    sample_indices: Sequence[int],
    noise_level: float | None,
) -> Tensor:
    """The loss (b,) of rows (b, l), whose answers are padded to the end of their last block."""
    end, length = model.config.eos_token_id, model.config.block_length
    ends = (input_ids != end).sum(1)  # (b,)
    coin = Random(f"{seed} {sample_indices[0]}").random()
    blocks = (ends + length - 1) // length + int(coin < NEXT_BLOCK)
    width = int(blocks.max()) * length
    input_ids = torch.nn.functional.pad(input_ids, (0, width - input_ids.shape[1]), value=end)
    answer_lengths = blocks * length - prompt_lengths
    key = {"seed": seed, "sample_indices": sample_indices, "noise_level": noise_level}
    return masked_losses(model, input_ids, prompt_lengths, answer_lengths=answer_lengths, **key)


def main(args: Arguments) -> dict:
    """Pre-trains, measures, writes the folder; returns what results.json holds."""
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    fields = config_fields(args.family, tokenizer)
    model = build_block_model(fields, tokenizer)
    training = PreTraining(
        args, model, tokenizer, block_losses, lambda: save_block_model(model, fields, tokenizer, args.output_dir)
    )
    results = {**training.results(), "losses": {str(level): training.validation_loss(level) for level in LEVELS}}
    results["exact_match"] = exact_match_by_family(model, tokenizer, training.held_out, gen_length=GEN_LENGTH)
    return write_results(args.output_dir, results, training=training.training.curve)


if __name__ == "__main__":
    print(json.dumps(main(parse(Arguments, __doc__)), indent=2))
