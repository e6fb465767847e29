"""The training loop of both scripts.

The loss of an optimizer step is the mean over its global batch: each forward's loss is the mean
over its samples, accelerate divides by the accumulated forwards, and DDP averages over processes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from operator import itemgetter
from typing import Any, NamedTuple, Protocol, cast

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from nara_diffusion.utils.data_order import stream_loader

from .checkpoints import resume_hint
from .command import InterruptRequest, TrainingDiverged
from .engines import prepare
from .optimization import (
    WeightAverage,
    average_weights,
    averaged,
    build_lr_scheduler,
    build_optimizer,
    freeze_core,
    may_fuse,
)
from .run import Run

logger = logging.getLogger(__name__)


class StepLoss(Protocol):
    """The result of a loss function: the scalar to differentiate, and losses (b,)."""

    @property
    def loss(self) -> Tensor: ...
    @property
    def per_sample(self) -> Tensor: ...


class Prepared(NamedTuple):
    """The objects that a training step uses, as `accelerator.prepare` returns them."""

    model: torch.nn.Module
    optimizer: AcceleratedOptimizer
    scheduler: AcceleratedScheduler
    loader: DataLoader
    average: WeightAverage | None  # of the trained weights, with --ema_decay


def prepare_training(
    run: Run, model: torch.nn.Module, samples: Dataset, collate: Callable[[list[dict]], Any]
) -> Prepared:
    """Return the model, optimizer, schedule and data loader of a planned run.

    Args:
        samples: the samples, indexed by position as in a `ShuffledStream`.
        collate: the function that turns a list of samples into a batch.
    """
    optimizer = build_optimizer(model, run.args, fused=may_fuse(run.accelerator))
    scheduler = build_lr_scheduler(optimizer, run.args, run.total_steps)
    loader = stream_loader(samples, collate, run.args.train_batch_size, run.positions_left())
    model, optimizer, scheduler, loader = prepare(
        run.accelerator, model, optimizer, scheduler, loader
    )
    average = average_weights(run.accelerator, model, run.args.ema_decay)
    return Prepared(model, optimizer, scheduler, loader, average)


def train(
    run: Run,
    parts: Prepared,
    compute_loss: Callable[[Any], StepLoss],
    validate: Callable[[], dict[str, float]],
    figures: Sequence[str] = (),
) -> None:
    """Train from `run.step` to `run.total_steps`. With --ema_decay, the model ends as the average.

    Args:
        parts: the result of `prepare_training`.
        compute_loss: a function batch → `StepLoss` that enters the `__call__` of the model.
        validate: a function that returns {name: value} to log every `--validation_steps` steps. It
            must not change the model's mode or the global random state.
        figures: names of further attributes (b,) of the loss; their means are logged beside it.

    Raises:
        TrainingDiverged: a loss or the norm of a gradient isn't finite. The host checks this only
            before it logs, validates or saves, so no such step is ever saved.
        SystemExit: training was stopped and a checkpoint written. The code is 130 after Ctrl-C and
            143 after SIGTERM.
    """
    accelerator, args = run.accelerator, run.args
    model, optimizer, scheduler, loader, average = parts
    model.train()
    pending = _Pending()
    with (
        InterruptRequest(accelerator.num_processes) as interrupt,
        tqdm(
            total=run.total_steps,
            initial=run.step,
            desc="train",
            unit="step",
            disable=not run.is_main,
        ) as bar,
    ):
        for batch in loader:
            with accelerator.accumulate(model):
                step = compute_loss(batch)
                measured = [step.per_sample, *(getattr(step, name) for name in figures)]
                pending.losses.append((run.step + 1, torch.stack(measured).detach().float()))
                accelerator.backward(step.loss)
                if accelerator.sync_gradients:
                    norm = _prepare_gradients(run, optimizer)
                    if norm is not None:
                        pending.norms.append((run.step + 1, norm))
                optimizer.step()
                if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                    scheduler.step()
                    if average is not None:
                        average.ema.step(average.weights)
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            run.step += 1
            bar.update()
            is_last = run.step == run.total_steps
            is_logged = is_last or _is_due(run.step, args.logging_steps)
            is_validated = _is_due(run.step, run.validation_steps)
            is_saved = _is_due(run.step, args.checkpointing_steps)
            is_saved |= is_last and args.checkpointing_steps is not None
            if is_logged or is_validated or is_saved:
                _collect(run, pending)
            if is_logged:
                _log_losses(run, bar, optimizer, figures)
            if is_validated:
                with averaged(average):
                    run.log(validate())
            if is_saved:
                run.save_checkpoint()
            if number := interrupt.of_any_process():
                _collect(run, pending)
                if not is_saved:
                    run.save_checkpoint()
                if run.is_main:
                    logger.warning("stopped after step %d. %s", run.step, resume_hint(run.folder))
                run.close()
                raise SystemExit(128 + number)
    if average is not None:
        average.ema.copy_to(average.weights)


@dataclass
class _Pending:
    """Values on the device that the host has yet to read, as (step, tensor)."""

    # of each forward (1 or more, b): the losses, then the figures
    losses: list[tuple[int, Tensor]] = field(default_factory=list)
    norms: list[tuple[int, Tensor]] = field(default_factory=list)  # of each step's gradient


def _collect(run: Run, pending: _Pending) -> None:
    """Read the pending losses of all processes. Raise if a loss or a norm isn't finite."""
    if not pending.losses:
        return
    steps, losses = zip(*pending.losses, strict=True)
    local = torch.stack(losses)  # (n, f, b)
    gathered = cast(Tensor, run.accelerator.gather(local))  # (processes · n, f, b)
    by_forward = gathered.unflatten(0, (-1, len(local))).permute(1, 2, 0, 3)
    failures, totals = [], run.unlogged
    for step, (losses, *figures) in zip(steps, by_forward.flatten(2).tolist(), strict=True):
        failures += [
            (step, f"the loss became {loss}") for loss in losses if not math.isfinite(loss)
        ]
        sums = [sum(losses), len(losses), *map(sum, figures)]
        totals = [total + new for total, new in zip_longest(totals, sums, fillvalue=0)]
    if pending.norms:
        steps_of_norms, tensors = zip(*pending.norms, strict=True)
        norms = torch.stack(tensors).tolist()  # one transfer
        failures += [
            (step, f"the gradient's norm became {norm}")
            for step, norm in zip(steps_of_norms, norms, strict=True)
            if not math.isfinite(norm)
        ]
    if failures:
        step, failure = min(failures, key=itemgetter(0))
        raise TrainingDiverged(
            f"In step {step} {failure}. Training stops, and nothing is overwritten. Lower --learning_rate or "
            "--core_learning_rate, raise --lr_warmup_steps, or use bf16 instead of fp16. "
            f"{resume_hint(run.folder)}"
        )
    run.unlogged = totals
    pending.losses.clear()
    pending.norms.clear()


def _prepare_gradients(run: Run, optimizer: AcceleratedOptimizer) -> Tensor | None:
    """Clip all gradients, after deleting those of the core before `core_start_step`.

    Return the norm of the gradients. Return None under fp16, since an overflow is normal there: the
    scaler skips the step and lowers its scale.
    """
    if run.step < run.args.core_start_step:
        freeze_core(optimizer)
    limit = math.inf if run.args.max_grad_norm is None else run.args.max_grad_norm
    # not model.parameters(), which walks over all modules
    trained = [weight for group in optimizer.param_groups for weight in group["params"]]
    norm = run.accelerator.clip_grad_norm_(trained, limit)
    if norm is None or run.accelerator.scaler is not None:
        return None
    norm = torch.as_tensor(norm).detach()
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _log_losses(
    run: Run, bar: tqdm, optimizer: AcceleratedOptimizer, figures: Sequence[str]
) -> None:
    """Log the means of losses and figures since the last log, and the learning rates."""
    total, number, *sums = run.unlogged
    run.unlogged = [0.0, 0]
    rates = {group.get("name", "adapter"): group["lr"] for group in optimizer.param_groups}
    values = {"loss": total / number, "learning_rate": rates["adapter"]}
    values |= {name: figure / number for name, figure in zip(figures, sums, strict=True)}
    if "core" in rates:
        values["core_learning_rate"] = rates["core"]
    run.log(values)
    bar.set_postfix(loss=f"{values['loss']:.3g}", lr=f"{values['learning_rate']:.3g}")


def _is_due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0
