"""Training that can be stopped, arguments and results: what the makers of all models share.

A step's data follows from the seed and the step's number alone, and the state file holds weights, optimiser, moving
average, step and curve; so a run that was stopped goes on to the same weights as one that was not.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import get_wsd_schedule

from nara_diffusion.utils.files import atomic_write


@dataclass(frozen=True)
class Plan:
    """How long and how fast one model is trained; ``batch`` is samples a step, ``decay`` the share of the steps, at
    the end, in which the learning rate falls to zero, and ``late_batch`` samples a step then."""

    steps: int
    batch: int
    learning_rate: float
    warmup: int = 100
    decay: float = 0.4
    late_batch: int | None = None  # as before
    weight_decay: float = 0.01
    ema: float | None = None  # decay of the moving average of the weights
    muon: float | None = None  # learning rate of Muon, for the matrices of blocks; without it AdamW trains all weights
    row_steps: int = 100  # steps between two rows of the curve
    save_steps: int = 500  # steps between two saved states
    bf16: bool = True


class Training:
    """One model's optimiser, schedule, moving average, step and curve, kept in ``state_file``."""

    def __init__(self, model: nn.Module, plan: Plan, state_file: Path, seed: int, device: str, resume: bool):
        self.model, self.plan, self.state_file, self.seed, self.device = model, plan, state_file, seed, device
        self.step, self.seconds, self.curve = 0, 0.0, []
        self.optimizers = optimizers_of(model, plan)
        self.ema = EMAModel(model.parameters(), decay=plan.ema) if plan.ema else None
        if state_file.exists():
            self._load(resume)
        self.schedules = [
            get_wsd_schedule(
                optimizer,
                num_warmup_steps=plan.warmup,
                num_decay_steps=round(plan.decay * plan.steps),
                num_training_steps=plan.steps,
                decay_type="linear",
                last_epoch=self.step - 1,
            )
            for optimizer in self.optimizers
        ]

    def _fixed(self) -> dict[str, Any]:
        """What must not change between the parts of a run; its length may, until the decay begins."""
        free = ("steps", "decay", "late_batch", "row_steps", "save_steps")
        return {"seed": self.seed} | {name: value for name, value in vars(self.plan).items() if name not in free}

    def _load(self, resume: bool) -> None:
        if not resume:
            raise ValueError(
                f"{self.state_file} is a run's state: add --resume to go on with it, or choose another --output_dir"
            )
        state = torch.load(self.state_file, map_location=self.device, weights_only=True)
        was = state["fixed"]
        changed = [f"{key} was {was.get(key)}" for key, value in self._fixed().items() if was.get(key) != value]
        if changed:
            raise ValueError(f"{self.state_file} is the state of another run: {', '.join(changed)}")
        self.model.load_state_dict(state["model"])
        for optimizer, optimizer_state in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.step, self.seconds, self.curve = state["step"], state["seconds"], state["curve"]

    def save(self) -> None:
        """Writes the state, whole or not at all."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "ema": None if self.ema is None else self.ema.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "curve": self.curve,
            "fixed": self._fixed(),
        }
        with atomic_write(self.state_file) as partial:
            torch.save(state, partial)

    @property
    def batch(self) -> int:
        """Samples of the present step."""
        plan = self.plan
        decaying = self.step >= plan.steps - round(plan.decay * plan.steps)
        return plan.late_batch if decaying and plan.late_batch is not None else plan.batch

    def generator(self) -> torch.Generator:
        """The random numbers of the present step."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.plan.bf16)

    def _update(self, loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.step(self.model.parameters())
        self.step += 1

    def run(
        self,
        name: str,
        loss_of: Callable[[Training], dict[str, Tensor]],
        measure: Callable[[], dict[str, float]],
        export: Callable[[], None] = lambda: None,
    ) -> None:
        """Steps until the plan's end. ``loss_of`` gives the step's named losses, of which "loss" is minimised;
        ``measure`` what a row of the curve holds beside their means; ``export`` writes a usable model."""
        plan, sums, started = self.plan, {}, time.monotonic() - self.seconds
        with tqdm(total=plan.steps, initial=self.step, desc=name, mininterval=2) as bar:
            while self.step < plan.steps:
                losses = loss_of(self)
                self._update(losses["loss"])
                for key, value in losses.items():
                    sums.setdefault(key, []).append(value.item())
                self.seconds = time.monotonic() - started
                bar.update()
                last = self.step == plan.steps
                if last or self.step % plan.row_steps == 0:
                    row = {key: sum(values) / len(values) for key, values in sums.items()} | with_average(self, measure)
                    sums = {}
                    rate = self.schedules[0].get_last_lr()[0]
                    self.curve.append({"step": self.step, "learning_rate": rate, "seconds": round(self.seconds)} | row)
                    bar.set_postfix({key: f"{value:.4f}" for key, value in row.items()})
                if last or self.step % plan.save_steps == 0:
                    self.save()
                    with_average(self, export)

    def finish(self) -> None:
        """Puts the moving average into the model for good."""
        if self.ema is not None:
            self.ema.copy_to(self.model.parameters())
        self.model.eval()


def optimizers_of(model: nn.Module, plan: Plan) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon where the plan has it: for the matrices inside the model's blocks, not those at its ends."""
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    inside = ("blocks.", "model.layers.")
    by_muon = {name for name, w in named if plan.muon and w.ndim == 2 and any(part in name for part in inside)}
    by_adamw = [weight for name, weight in named if name not in by_muon]
    adamw = torch.optim.AdamW(
        by_adamw, plan.learning_rate, betas=(0.9, 0.98), weight_decay=plan.weight_decay, fused=True
    )
    if not by_muon:
        return [adamw]
    matrices = [weight for name, weight in named if name in by_muon]
    options = {"weight_decay": plan.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
    return [adamw, torch.optim.Muon(matrices, plan.muon, **options)]


def with_average(training: Training, action: Callable[[], Any]) -> Any:
    """``action()`` in evaluation mode and without gradients, with the moving average in the weights' place."""
    model, ema = training.model, training.ema
    if ema is not None:
        ema.store(model.parameters())
        ema.copy_to(model.parameters())
    model.eval()
    try:
        with torch.no_grad():
            return action()
    finally:
        model.train()
        if ema is not None:
            ema.restore(model.parameters())


def load_as_float32(folder: Path) -> None:
    """Lets transformers load the float16 weights in ``folder`` as float32 where no dtype is given, as diffusers does: a
    pipeline whose text encoders alone came in float16 would not run."""
    path = folder / "config.json"
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | {"dtype": "float32"})


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_results(folder: Path, results: dict[str, Any], **curves: list[dict]) -> dict[str, Any]:
    """Writes results.json, from which a model card takes its figures, and NAME_curve.csv; returns ``results``."""
    write_json(folder / "results.json", results)
    for name, curve in curves.items():
        with (folder / f"{name}_curve.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(curve[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(curve)
    return results


def option(default: Any, text: str) -> Any:
    """A dataclass's field with its help; one whose default is False is a switch."""
    return field(default=default, metadata={"help": text})


def parse(arguments: type, description: str | None, argv: list[str] | None = None) -> Any:
    """An instance of the dataclass ``arguments``, of fields that ``option`` makes, from the command line."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for option in fields(arguments):
        flag, text = f"--{option.name}", option.metadata["help"]
        if option.default is False:
            parser.add_argument(flag, action="store_true", help=text)
        else:
            kind = type(option.default)
            parser.add_argument(flag, type=kind, default=option.default, help=f"{text} (default: {option.default})")
    return arguments(**vars(parser.parse_args(argv)))
