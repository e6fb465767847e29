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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_text.backbones import save_llada_checkpoint
from tiny_text.data import LONGEST_TAIL, Rows, encode, training_and_validation
from tiny_text.tokenizer import build_tokenizer
from tiny_text.uniform import noise_tokens, uniform_corruption, uniform_loss
from tiny_training import Plan, Training, option, parse, write_results
from torch import Tensor
from transformers import PreTrainedModel

from nara_diffusion.dllm import load_backbone

VALIDATION_BATCH = 256  # questions
START = Path(__file__).parents[1] / "llada-tiny"
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # λ of the card's table


@dataclass
class Arguments:
    """What the command line sets."""

    output_dir: Path = option(Path("outputs/uniform-tiny"), "folder of the model")
    max_train_steps: int = option(1500, "optimiser steps")
    train_batch_size: int = option(96, "questions a step")
    learning_rate: float = option(2e-3, "of AdamW, after warm-up and before decay")
    train_size: int = option(40000, "questions a family to learn from")
    validation_size: int = option(128, "held-out questions a family")
    seed: int = option(0, "of weights, questions, noise levels and tokens")
    device: str = option("cpu", "torch device")
    resume: bool = option(False, "go on from the state in --output_dir")


def step_loss(model: PreTrainedModel, rows: Rows, tokens: Tensor, training: Training) -> dict[str, Tensor]:
    """Of the present step, whose questions and noise follow from the seed and its number."""
    generator = training.generator()
    indices = torch.randint(len(rows.ends), (training.batch,), generator=generator)
    tail = int(torch.randint(LONGEST_TAIL + 1, (), generator=generator))
    first = training.step * training.batch
    samples = range(first, first + len(indices))
    return {"loss": _losses(model, rows, tokens, indices, tail, training.seed, samples).mean()}


@torch.no_grad()
def validation_loss(model: PreTrainedModel, rows: Rows, tokens: Tensor, seed: int, level: float | None = None) -> float:
    """Over all `rows`, on noise that is the same at every call; of λ in (0, 1), or of one λ."""
    parts = torch.arange(len(rows.ends)).split(VALIDATION_BATCH)
    losses = [_losses(model, rows, tokens, part, 0, seed + 1, part.tolist(), level) for part in parts]
    return torch.cat(losses).mean().item()


def _losses(
    model: PreTrainedModel,
    rows: Rows,
    tokens: Tensor,
    indices: Tensor,
    tail: int,
    seed: int,
    samples: Sequence[int],
    level: float | None = None,
) -> Tensor:
    input_ids, prompt_lengths = (tensor.to(model.device) for tensor in rows.batch(indices, tail))
    options: dict[str, Any] = {"seed": seed, "sample_indices": samples, "noise_level": level}
    return uniform_loss(model, uniform_corruption(input_ids, prompt_lengths, tokens, **options))


def main(args: Arguments) -> dict:
    """Trains, measures, writes the folder; returns what results.json holds."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    model, _ = load_backbone(str(START))
    tokenizer = build_tokenizer()
    tokens = noise_tokens(tokenizer)
    learned, held_out = training_and_validation(args.train_size, args.validation_size, args.seed)
    rows = encode(learned, tokenizer)
    validation = encode([item for items in held_out.values() for item in items], tokenizer)
    plan = Plan(args.max_train_steps, args.train_batch_size, args.learning_rate, decay=0.3, bf16=False)
    training = Training(
        model.to(args.device), plan, args.output_dir / "training_state.pt", args.seed, args.device, args.resume
    )
    training.run(
        "training",
        lambda now: step_loss(model, rows, tokens, now),
        lambda: {"validation_loss": validation_loss(model, validation, tokens, args.seed)},
        lambda: save_llada_checkpoint(model, tokenizer, args.output_dir),
    )
    model.eval()
    results = {
        "steps": training.step,
        "minutes": round(training.seconds / 60, 1),
        "seed": args.seed,
        "parameters": model.num_parameters(),
        "validation_loss": training.curve[-1]["validation_loss"],
        "losses": {str(x): validation_loss(model, validation, tokens, args.seed, x) for x in LEVELS},
    }
    return write_results(args.output_dir, results, training=training.curve)


if __name__ == "__main__":
    print(json.dumps(main(parse(Arguments, __doc__)), indent=2))
