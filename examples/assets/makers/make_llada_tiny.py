"""Pre-trains llada-tiny, the small masked-diffusion language model that the examples and the default run use; or
dream-tiny, its sibling of another family, for the benchmark of quality.

    python examples/assets/makers/make_llada_tiny.py                                          # an hour on one CPU core
    python examples/assets/makers/make_llada_tiny.py --output_dir outputs/trial --max_train_steps 300  # two minutes
    python examples/assets/makers/make_llada_tiny.py --family dream --seed 1 --output_dir outputs/dream-tiny

Both have attention in both directions and are trained with LLaDA's objective on the questions of tiny_text/tasks.py.
llada is a Llama, written in LLaDA's own checkpoint format; dream is a Qwen2 with fewer key heads and biases, whose
logits are shifted by one position as Dream's are, written as transformers writes it.

A run that was stopped, by Ctrl-C or by a power cut, goes on with --resume from its last saved state, and ends with the
same weights as if it had not been stopped. The learning rate is constant until the last --decay_share of the steps, so
until then a run may also be resumed with another --max_train_steps.

Written to --output_dir: model.safetensors, config.json, the tokenizer, training_curve.csv, results.json; and
training_state.pt, which --resume reads and nobody else needs.
"""

# ruff: noqa: RUF009 (option() is dataclasses.field() with metadata, not a shared default)
from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tiny_text.backbones import BACKBONES
from tiny_text.data import LONGEST_TAIL, MAX_TOKENS, Rows, encode, training_and_validation
from tiny_text.evaluation import exact_match_by_family, validation_loss
from tiny_text.tokenizer import build_tokenizer
from tiny_training import Plan, Training, option, parse, write_results

from nara_diffusion.dllm import masked_diffusion_loss


@dataclass
class Arguments:
    """What the command line sets."""

    output_dir: Path = option(Path("outputs/llada-tiny"), "folder of the model")
    family: str = option("llada", "llada or dream")
    max_train_steps: int = option(8000, "optimiser steps")
    train_batch_size: int = option(96, "questions a step")
    learning_rate: float = option(2e-3, "of AdamW, after warm-up and before decay")
    lr_warmup_steps: int = option(200, "steps of linear warm-up")
    decay_share: float = option(0.3, "share of the steps, at the end, over which the learning rate falls to zero")
    weight_decay: float = option(0.01, "of AdamW")
    train_size: int = option(40000, "questions a family to learn from")
    validation_size: int = option(128, "held-out questions a family")
    validation_steps: int = option(500, "steps between two rows of training_curve.csv")
    checkpointing_steps: int = option(500, "steps between two saved states, each with a usable model beside it")
    seed: int = option(0, "of weights, questions, noise levels and masks")
    device: str = option("cpu", "torch device")
    resume: bool = option(False, "go on from the state in --output_dir")


def step_loss(training: Training, rows: Rows) -> dict[str, torch.Tensor]:
    """Of the present step, whose questions, noise levels and masks follow from the seed and the step's number alone."""
    generator = training.generator()
    indices = torch.randint(len(rows.ends), (training.batch,), generator=generator)
    tail = int(torch.randint(LONGEST_TAIL + 1, (), generator=generator))
    input_ids, prompt_lengths = (tensor.to(training.device) for tensor in rows.batch(indices, tail))
    first = training.step * training.batch
    samples = range(first, first + training.batch)
    options = {"seed": training.seed, "sample_indices": samples, "logits": "all"}
    return {"loss": masked_diffusion_loss(training.model, input_ids, prompt_lengths, **options).loss}


def main(args: Arguments) -> dict:
    """Pre-trains, evaluates, writes the folder; returns what results.json holds."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    train_questions, validation_questions = training_and_validation(args.train_size, args.validation_size, args.seed)
    rows = encode(train_questions, tokenizer)
    validation = encode([item for items in validation_questions.values() for item in items], tokenizer)
    backbone = BACKBONES[args.family]
    model = backbone.build(len(tokenizer))
    model.config.mask_token_id = tokenizer.mask_token_id
    plan = Plan(
        steps=args.max_train_steps,
        batch=args.train_batch_size,
        learning_rate=args.learning_rate,
        warmup=args.lr_warmup_steps,
        decay=args.decay_share,
        weight_decay=args.weight_decay,
        row_steps=args.validation_steps,
        save_steps=args.checkpointing_steps,
        bf16=False,
    )
    state = args.output_dir / "training_state.pt"
    training = Training(model.to(args.device), plan, state, args.seed, args.device, args.resume)
    training.run(
        "pre-training",
        lambda now: step_loss(now, rows),
        lambda: {"validation_loss": validation_loss(model, validation, seed=args.seed)},
        lambda: backbone.save(model, tokenizer, args.output_dir),
    )
    model.eval()
    results = {
        "steps": training.step,
        "minutes": round(training.seconds / 60, 1),
        "seed": args.seed,
        "parameters": model.num_parameters(),
        "rows": len(rows.ends),
        "max_tokens": MAX_TOKENS,
        "validation_loss": training.curve[-1]["validation_loss"],
        "exact_match": exact_match_by_family(model, tokenizer, validation_questions),
    }
    return write_results(args.output_dir, results, training=training.curve)


if __name__ == "__main__":
    print(json.dumps(main(parse(Arguments, __doc__)), indent=2))
