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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_text.backbones import BACKBONES
from tiny_text.data import LONGEST_TAIL, MAX_TOKENS, Rows, encode, exact_match_by_family, training_and_validation
from tiny_text.tokenizer import build_tokenizer
from tiny_training import Plan, Training, option, parse, write_results
from torch import Tensor
from transformers import PreTrainedModel

from nara_diffusion.dllm import masked_diffusion_loss

VALIDATION_BATCH = 256  # questions
Losses = Callable[..., Tensor]


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
    muon: float = option(0.0, "learning rate of Muon, for the matrices of blocks; 0: AdamW trains all weights")
    train_size: int = option(40000, "questions a family to learn from")
    validation_size: int = option(128, "held-out questions a family")
    validation_steps: int = option(500, "steps between two rows of training_curve.csv")
    checkpointing_steps: int = option(500, "steps between two saved states, each with a usable model beside it")
    seed: int = option(0, "of weights, questions, noise levels and masks")
    device: str = option("cpu", "torch device")
    resume: bool = option(False, "go on from the state in --output_dir")


def masked_losses(model: PreTrainedModel, input_ids: Tensor, prompt_lengths: Tensor, **key: Any) -> Tensor:
    """LLaDA's loss (b,) of each row; ``key`` is of `masked_diffusion_loss`: seed, sample_indices, noise_level."""
    return masked_diffusion_loss(model, input_ids, prompt_lengths, chunk_size=None, **key).per_sample


class PreTraining:
    """The training of a model on the questions of tiny_text/tasks.py, and its loss on held-out ones.

    ``losses`` gives the loss (b,) of each row, ``save`` writes a usable model.
    """

    def __init__(
        self, args: Arguments, model: PreTrainedModel, tokenizer: Any, losses: Losses, save: Callable[[], None]
    ) -> None:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        self.args, self.model, self.losses = args, model.to(args.device), losses
        learned, self.held_out = training_and_validation(args.train_size, args.validation_size, args.seed)
        self.rows = encode(learned, tokenizer)
        self.validation = encode([item for items in self.held_out.values() for item in items], tokenizer)
        plan = Plan(
            steps=args.max_train_steps,
            batch=args.train_batch_size,
            learning_rate=args.learning_rate,
            warmup=args.lr_warmup_steps,
            decay=args.decay_share,
            weight_decay=args.weight_decay,
            muon=args.muon or None,
            row_steps=args.validation_steps,
            save_steps=args.checkpointing_steps,
            bf16=False,
        )
        state = args.output_dir / "training_state.pt"
        self.training = Training(self.model, plan, state, args.seed, args.device, args.resume)
        self.training.run("training", self.step_loss, lambda: {"validation_loss": self.validation_loss()}, save)
        self.model.eval()

    def step_loss(self, now: Training) -> dict[str, Tensor]:
        """Of the present step, whose questions, noise levels and noise follow from the seed and the step's number."""
        generator = now.generator()
        indices = torch.randint(len(self.rows.ends), (now.batch,), generator=generator)
        tail = int(torch.randint(LONGEST_TAIL + 1, (), generator=generator))
        first = now.step * now.batch
        return {"loss": self._losses(self.rows, indices, tail, now.seed, range(first, first + now.batch)).mean()}

    @torch.no_grad()
    def validation_loss(self, level: float | None = None) -> float:
        """Over the held-out questions, on noise that is the same at every call; of λ in (0, 1), or of one λ."""
        rows, seed = self.validation, self.args.seed + 1
        parts = torch.arange(len(rows.ends)).split(VALIDATION_BATCH)
        return torch.cat([self._losses(rows, part, 0, seed, part.tolist(), level) for part in parts]).mean().item()

    def results(self) -> dict[str, Any]:
        """What results.json holds of any of these models."""
        return {
            "steps": self.training.step,
            "minutes": round(self.training.seconds / 60, 1),
            "seed": self.args.seed,
            "parameters": self.model.num_parameters(),
            "validation_loss": self.training.curve[-1]["validation_loss"],
        }

    def _losses(
        self, rows: Rows, indices: Tensor, tail: int, seed: int, samples: Sequence[int], level: float | None = None
    ) -> Tensor:
        batch = (tensor.to(self.model.device) for tensor in rows.batch(indices, tail))
        return self.losses(self.model, *batch, seed=seed, sample_indices=samples, noise_level=level)


def main(args: Arguments) -> dict:
    """Pre-trains, evaluates, writes the folder; returns what results.json holds."""
    torch.manual_seed(args.seed)
    tokenizer, backbone = build_tokenizer(), BACKBONES[args.family]
    model = backbone.build(len(tokenizer))
    model.config.mask_token_id = tokenizer.mask_token_id
    training = PreTraining(
        args, model, tokenizer, masked_losses, lambda: backbone.save(model, tokenizer, args.output_dir)
    )
    exact = exact_match_by_family(model, tokenizer, training.held_out)
    sizes = {"rows": len(training.rows.ends), "max_tokens": MAX_TOKENS}
    results = {**training.results(), **sizes, "exact_match": exact}
    return write_results(args.output_dir, results, training=training.training.curve)


if __name__ == "__main__":
    print(json.dumps(main(parse(Arguments, __doc__)), indent=2))
