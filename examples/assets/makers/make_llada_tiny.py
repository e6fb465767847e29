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

Written to --output_dir: model.safetensors, config.json, the tokenizer, README.md (the model card), training_curve.csv
and .png, results.json; and training_state.pt, which --resume reads and nobody else needs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from tiny_text.backbones import BACKBONES
from tiny_text.card import write_card
from tiny_text.data import LONGEST_TAIL, MAX_TOKENS, Rows, encode, training_and_validation
from tiny_text.evaluation import exact_match_by_family, validation_loss
from tiny_text.tokenizer import build_tokenizer
from tqdm import tqdm
from transformers import PreTrainedModel, get_wsd_schedule

from nara_diffusion.dllm import masked_diffusion_loss

STATE_FILE = "training_state.pt"


@dataclass
class Arguments:
    """What the command line sets; --help says what each is."""

    output_dir: Path = Path("outputs/llada-tiny")
    family: str = "llada"
    max_train_steps: int = 8000
    train_batch_size: int = 96
    learning_rate: float = 2e-3
    lr_warmup_steps: int = 200
    decay_share: float = 0.3
    weight_decay: float = 0.01
    train_size: int = 40000
    validation_size: int = 128
    validation_steps: int = 500
    checkpointing_steps: int = 500
    seed: int = 0
    device: str = "cpu"
    resume: bool = False


HELP = {
    "output_dir": "folder of the model",
    "family": "llada or dream",
    "max_train_steps": "optimiser steps",
    "train_batch_size": "questions a step",
    "learning_rate": "of AdamW, after warm-up and before decay",
    "lr_warmup_steps": "steps of linear warm-up",
    "decay_share": "share of the steps, at the end, over which the learning rate falls to zero",
    "weight_decay": "of AdamW",
    "train_size": "questions a family to learn from",
    "validation_size": "held-out questions a family",
    "validation_steps": "steps between two rows of training_curve.csv",
    "checkpointing_steps": "steps between two saved states, each with a usable model beside it",
    "seed": "of weights, questions, noise levels and masks",
    "device": "torch device",
    "resume": "go on from the state in --output_dir",
}


def parse_arguments(argv: list[str] | None = None) -> Arguments:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for field in fields(Arguments):
        if field.name == "resume":
            parser.add_argument("--resume", action="store_true", help=HELP["resume"])
            continue
        kind = type(field.default)
        parser.add_argument(
            f"--{field.name}", type=kind, default=field.default, help=f"{HELP[field.name]} (default: {field.default})"
        )
    return Arguments(**vars(parser.parse_args(argv)))


class Run:
    """Model, optimiser, schedule, step and curve of one training; all that a resume needs is in its state file."""

    def __init__(self, args: Arguments, model: PreTrainedModel):
        self.args, self.model = args, model
        self.step, self.seconds, self.curve = 0, 0.0, []
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, betas=(0.9, 0.98)
        )
        if args.resume:
            self._load()
        decay = round(args.decay_share * args.max_train_steps)
        self.schedule = get_wsd_schedule(
            self.optimizer,
            num_warmup_steps=args.lr_warmup_steps,
            num_decay_steps=decay,
            num_training_steps=args.max_train_steps,
            decay_type="linear",
            last_epoch=self.step - 1,
        )

    def _load(self) -> None:
        path = self.args.output_dir / STATE_FILE
        if not path.exists():
            raise ValueError(f"--resume was given, but {path} doesn't exist: start without --resume")
        state = torch.load(path, map_location=self.args.device, weights_only=True)
        changed = [key for key, value in state["arguments"].items() if str(getattr(self.args, key)) != value]
        if changed:
            raise ValueError(f"{path} was written with another {', '.join(changed)}: {state['arguments']}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.curve = state["step"], state["seconds"], state["curve"]

    def save(self) -> None:
        """Writes the state beside its name first, so that an interrupted write leaves the previous one whole."""
        free = ("output_dir", "max_train_steps", "resume", "device")
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "curve": self.curve,
            "arguments": {key: str(value) for key, value in asdict(self.args).items() if key not in free},
        }
        path = self.args.output_dir / STATE_FILE
        torch.save(state, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)

    def train_step(self, rows: Rows) -> float:
        """One step; its questions, noise levels and masks follow from the seed and the step's number alone."""
        args = self.args
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + self.step)
        indices = torch.randint(len(rows.ends), (args.train_batch_size,), generator=generator)
        tail = int(torch.randint(LONGEST_TAIL + 1, (), generator=generator))
        input_ids, prompt_lengths = rows.batch(indices, tail)
        first = self.step * args.train_batch_size
        loss = masked_diffusion_loss(
            self.model,
            input_ids.to(args.device),
            prompt_lengths.to(args.device),
            seed=args.seed,
            sample_indices=range(first, first + args.train_batch_size),
            logits="all",
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.item()


def train(run: Run, rows: Rows, validation: Rows, save: Callable[[], None]) -> None:
    """Steps until --max_train_steps, with a row of the curve and a saved state now and then."""
    args, losses, started = run.args, [], time.monotonic() - run.seconds
    with tqdm(total=args.max_train_steps, initial=run.step, desc="pre-training") as bar:
        while run.step < args.max_train_steps:
            losses.append(run.train_step(rows))
            run.seconds = time.monotonic() - started
            bar.update()
            if run.step % args.validation_steps == 0 or run.step == args.max_train_steps:
                row = {
                    "step": run.step,
                    "learning_rate": run.schedule.get_last_lr()[0],
                    "train_loss": sum(losses) / len(losses),
                    "validation_loss": validation_loss(run.model, validation, seed=args.seed),
                    "seconds": round(run.seconds),
                }
                run.curve.append(row)
                bar.set_postfix(train=f"{row['train_loss']:.3f}", validation=f"{row['validation_loss']:.3f}")
                losses = []
            if run.step % args.checkpointing_steps == 0 or run.step == args.max_train_steps:
                run.save()
                save()


def main(args: Arguments) -> dict:
    """Pre-trains, evaluates, writes the folder; returns what results.json holds."""
    if args.family not in BACKBONES:
        raise ValueError(f"--family is {args.family!r}, expected one of {', '.join(BACKBONES)}")
    if not args.resume and (args.output_dir / STATE_FILE).exists():
        raise ValueError(
            f"{args.output_dir} holds a run: add --resume to go on with it, or choose another --output_dir"
        )
    args.output_dir.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    train_questions, validation_questions = training_and_validation(args.train_size, args.validation_size, args.seed)
    rows = encode(train_questions, tokenizer)
    validation = encode([item for items in validation_questions.values() for item in items], tokenizer)

    backbone = BACKBONES[args.family]
    model = backbone.build(len(tokenizer))
    model.config.mask_token_id = tokenizer.mask_token_id
    run = Run(args, model.to(args.device))
    train(run, rows, validation, save=lambda: backbone.save(model, tokenizer, args.output_dir))

    results = {
        "steps": run.step,
        "minutes": round(run.seconds / 60, 1),
        "seed": args.seed,
        "parameters": model.num_parameters(),
        "rows": len(rows.ends),
        "max_tokens": MAX_TOKENS,
        "validation_loss": run.curve[-1]["validation_loss"],
        "exact_match": exact_match_by_family(model, tokenizer, validation_questions),
    }
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    write_card(args.output_dir, asdict(args), results, run.curve)
    return results


if __name__ == "__main__":
    print(json.dumps(main(parse_arguments()), indent=2))
