"""Pre-trains uniform-tiny, a small language model that is given random tokens in place of masks: one blind to λ.

    python examples/assets/make_uniform_tiny.py                                      # 10 to 20 minutes of one CPU core
    python examples/assets/make_uniform_tiny.py --output_dir outputs/trial --max_train_steps 100

It has llada-tiny's network, tokenizer, questions and checkpoint format, and the objective of tiny_uniform.py. The
benchmark of regimes fine-tunes it. A run that was stopped goes on with --resume.

Written to --output_dir: model.safetensors, config.json, the tokenizer, training_curve.csv, results.json; and
training_state.pt, which --resume reads and nobody else needs.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tiny_backbones import BACKBONES
from tiny_data import LONGEST_TAIL, Rows, encode, training_and_validation
from tiny_tokenizer import build_tokenizer
from tiny_training import Plan, Training, parse
from tiny_uniform import uniform_corruption, uniform_loss
from torch import Tensor
from transformers import PreTrainedModel

VALIDATION_BATCH = 256  # questions


@dataclass
class Arguments:
    """What the command line sets; --help says what each is."""

    output_dir: Path = Path("outputs/uniform-tiny")
    max_train_steps: int = 3000
    train_batch_size: int = 96
    learning_rate: float = 2e-3
    train_size: int = 40000
    validation_size: int = 128
    seed: int = 0
    device: str = "cpu"
    resume: bool = False


HELP = {
    "output_dir": "folder of the model",
    "max_train_steps": "optimiser steps",
    "train_batch_size": "questions a step",
    "learning_rate": "of AdamW, after warm-up and before decay",
    "train_size": "questions a family to learn from",
    "validation_size": "held-out questions a family",
    "seed": "of weights, questions, noise levels and tokens",
    "device": "torch device",
    "resume": "go on from the state in --output_dir",
}


def step_loss(model: PreTrainedModel, rows: Rows, training: Training) -> dict[str, Tensor]:
    """Of the present step, whose questions and noise follow from the seed and its number."""
    generator = training.generator()
    indices = torch.randint(len(rows.ends), (training.batch,), generator=generator)
    tail = int(torch.randint(LONGEST_TAIL + 1, (), generator=generator))
    first = training.step * training.batch
    return {"loss": _losses(model, rows, indices, tail, training.seed, range(first, first + len(indices))).mean()}


@torch.no_grad()
def validation_loss(model: PreTrainedModel, rows: Rows, seed: int) -> float:
    """Over all `rows`, on noise that is the same at every call."""
    parts = torch.arange(len(rows.ends)).split(VALIDATION_BATCH)
    losses = [_losses(model, rows, part, 0, seed + 1, part.tolist()) for part in parts]
    return torch.cat(losses).mean().item()


def _losses(
    model: PreTrainedModel, rows: Rows, indices: Tensor, tail: int, seed: int, samples: Sequence[int]
) -> Tensor:
    input_ids, prompt_lengths = (tensor.to(model.device) for tensor in rows.batch(indices, tail))
    size = model.config.vocab_size
    return uniform_loss(model, uniform_corruption(input_ids, prompt_lengths, size, seed=seed, sample_indices=samples))


def main(args: Arguments) -> dict:
    """Pre-trains, measures, writes the folder; returns what results.json holds."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    learned, held_out = training_and_validation(args.train_size, args.validation_size, args.seed)
    rows = encode(learned, tokenizer)
    validation = encode([item for items in held_out.values() for item in items], tokenizer)
    backbone = BACKBONES["llada"]
    model = backbone.build(len(tokenizer)).to(args.device)
    model.config.mask_token_id = tokenizer.mask_token_id
    plan = Plan(args.max_train_steps, args.train_batch_size, args.learning_rate, decay=0.3, bf16=False)
    training = Training(model, plan, args.output_dir / "training_state.pt", args.seed, args.device, args.resume)
    training.run(
        "pre-training",
        lambda now: step_loss(model, rows, now),
        lambda: {"validation_loss": validation_loss(model, validation, args.seed)},
        lambda: backbone.save(model, tokenizer, args.output_dir),
    )
    results = {
        "steps": training.step,
        "minutes": round(training.seconds / 60, 1),
        "parameters": model.num_parameters(),
        "validation_loss": training.curve[-1]["validation_loss"],
        "arguments": {name: str(value) for name, value in asdict(args).items()},
    }
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    with (args.output_dir / "training_curve.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(training.curve[-1]))
        writer.writeheader()
        writer.writerows(training.curve)
    return results


if __name__ == "__main__":
    print(json.dumps(main(parse(Arguments, __doc__, HELP)), indent=2))
