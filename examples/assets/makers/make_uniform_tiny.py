"""Makes uniform-tiny, a small language model that is given random tokens in place of masks, of llada-tiny: one that is
blind to λ of one that sees it.

    python examples/assets/makers/make_uniform_tiny.py                              # 10 to 20 minutes of one CPU core
    python examples/assets/makers/make_uniform_tiny.py --output_dir outputs/trial --max_train_steps 100

It starts from llada-tiny's weights, as Dream does from Qwen2.5's, and has its
tokenizer, questions and checkpoint format; all weights are trained, with the objective of tiny_text/uniform.py. The
benchmark of regimes fine-tunes it. A run that was stopped goes on with --resume.

Written to --output_dir: model.safetensors, config.json, the tokenizer, training_curve.csv, results.json; and
training_state.pt, which --resume reads and nobody else needs.
"""

# ruff: noqa: RUF009 (option() is dataclasses.field() with metadata, not a shared default)
from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from make_llada_tiny import Arguments as LladaArguments
from make_llada_tiny import PreTraining
from tiny_text.backbones import save_llada_checkpoint
from tiny_text.tokenizer import build_tokenizer
from tiny_text.uniform import noise_tokens, uniform_corruption, uniform_loss
from tiny_training import option, parse, write_results
from torch import Tensor
from transformers import PreTrainedModel

from nara_diffusion.dllm import load_backbone

START = Path(__file__).parents[1] / "llada-tiny"
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # λ of the card's table


@dataclass
class Arguments(LladaArguments):
    """What the command line sets."""

    output_dir: Path = option(Path("outputs/uniform-tiny"), "folder of the model")
    max_train_steps: int = option(1500, "optimiser steps")
    lr_warmup_steps: int = option(100, "steps of linear warm-up")
    validation_steps: int = option(100, "steps between two rows of training_curve.csv")


def main(args: Arguments) -> dict:
    """Trains, measures, writes the folder; returns what results.json holds."""
    torch.manual_seed(args.seed)
    model, _ = load_backbone(str(START))
    tokenizer = build_tokenizer()
    tokens = noise_tokens(tokenizer)

    def losses(model: PreTrainedModel, input_ids: Tensor, prompt_lengths: Tensor, **key: Any) -> Tensor:
        return uniform_loss(model, uniform_corruption(input_ids, prompt_lengths, tokens, **key))

    training = PreTraining(
        args, model, tokenizer, losses, lambda: save_llada_checkpoint(model, tokenizer, args.output_dir)
    )
    results = {**training.results(), "losses": {str(level): training.validation_loss(level) for level in LEVELS}}
    return write_results(args.output_dir, results, training=training.training.curve)


if __name__ == "__main__":
    print(json.dumps(main(parse(Arguments, __doc__)), indent=2))
