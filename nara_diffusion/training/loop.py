"""The training loop of both scripts, and its end by Ctrl-C or SIGTERM.

The loss of an optimizer step is the mean over its global batch: each forward's loss is the mean
over its samples, accelerate divides by the accumulated forwards, and DDP averages over processes.

Ctrl-C and SIGTERM end training after the current step, in all processes at once.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from nara_diffusion.utils.data_order import stream_loader

from .checkpoints import last_checkpoint
from .command import TrainingDiverged
from .engines import build_lr_scheduler, build_optimizer, freeze_core, may_fuse, prepare
from .run import Run

logger = logging.getLogger(__name__)


class StepLoss(Protocol):
    """The result of a loss function: the scalar to differentiate, losses (b,) and λ (b,)."""

    @property
    def loss(self) -> Tensor: ...
    @property
    def per_sample(self) -> Tensor: ...
    @property
    def noise_level(self) -> Tensor: ...


class Prepared(NamedTuple):
    """The objects that a training step uses, as `accelerator.prepare` returns them."""

    model: torch.nn.Module
    optimizer: AcceleratedOptimizer
    scheduler: AcceleratedScheduler
    loader: DataLoader


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
    left = run.positions_left()
    size = run.args.train_batch_size
    loader = stream_loader(samples, collate, batch_size=size, first=left.start, stop=left.stop)
    return Prepared(*prepare(run.accelerator, model, optimizer, scheduler, loader))


def train(
    run: Run,
    parts: Prepared,
    compute_loss: Callable[[Any], StepLoss],
    validate: Callable[[], dict[str, float]],
) -> None:
    """Train from `run.step` to `run.total_steps`.

    Args:
        parts: the result of `prepare_training`.
        compute_loss: a function batch → `StepLoss` that enters the `__call__` of the model.
        validate: a function that returns {name: value} to log every `--validation_steps` steps. It
            must not change the model's mode or the global random state.

    Raises:
        TrainingDiverged: a loss or the norm of a gradient isn't finite. The host checks this only
            before it logs, validates or saves, so no such step is ever saved.
        SystemExit: training was stopped and a checkpoint written. The code is 130 after Ctrl-C and
            143 after SIGTERM.
    """
    accelerator, args, (model, optimizer, scheduler, loader) = run.accelerator, run.args, parts
    bar = tqdm(
        total=run.total_steps, initial=run.step, desc="train", unit="step", disable=not run.is_main
    )
    model.train()
    pending = _Pending()
    with InterruptRequest(accelerator.num_processes) as interrupt, bar:
        for batch in loader:
            with accelerator.accumulate(model):
                step = compute_loss(batch)
                pending.losses.append((run.step + 1, step.per_sample.detach().float()))
                accelerator.backward(step.loss)
                if accelerator.sync_gradients:
                    norm = _prepare_gradients(run, model, optimizer)
                    if norm is not None:
                        pending.norms.append((run.step + 1, norm))
                optimizer.step()
                if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                    scheduler.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            run.step += 1
            bar.update()
            is_logged = run.step % args.logging_steps == 0 or run.step == run.total_steps
            dues = (run.validation_steps, args.checkpointing_steps)
            if is_logged or any(_due(run.step, every) for every in dues):
                _collect(run, pending)
            if is_logged:
                _report(run, bar, optimizer)
            if _due(run.step, run.validation_steps):
                run.log(validate())
            is_saved = _save_if_due(run)
            if number := interrupt.of_any_process():
                _collect(run, pending)
                _stop(run, number, is_saved)


@dataclass
class _Pending:
    """Values on the device that the host has yet to read, as (step, tensor)."""

    losses: list[tuple[int, Tensor]] = field(default_factory=list)  # (b,) of each forward
    norms: list[tuple[int, Tensor]] = field(default_factory=list)  # of each step's gradient


def _collect(run: Run, pending: _Pending) -> None:
    """Read the pending losses of all processes. Raise if a loss or a norm isn't finite."""
    if not pending.losses:
        return
    steps = [step for step, _ in pending.losses]
    own = torch.stack([losses for _, losses in pending.losses])  # (n, b)
    gathered = cast(Tensor, run.accelerator.gather(own))  # (processes · n, b)
    values = gathered.unflatten(0, (-1, len(own))).transpose(0, 1).flatten(1).tolist()
    bad = []
    total, number = run.unlogged
    for step, losses in zip(steps, values, strict=True):
        bad += [(step, f"the loss became {loss}") for loss in losses if not math.isfinite(loss)]
        total, number = total + sum(losses), number + len(losses)
    if pending.norms:
        norms = torch.stack([norm for _, norm in pending.norms]).tolist()
        for (step, _), norm in zip(pending.norms, norms, strict=True):
            if not math.isfinite(norm):
                bad.append((step, f"the gradient's norm became {norm}"))
    if bad:
        step, what = min(bad, key=lambda each: each[0])
        raise _diverged(run, step, what)
    run.unlogged = [total, number]
    pending.losses.clear()
    pending.norms.clear()


def _prepare_gradients(
    run: Run, model: torch.nn.Module, optimizer: AcceleratedOptimizer
) -> Tensor | None:
    """Clip all gradients, after deleting those of the core before `core_start_step`.

    Return the norm of the gradients. Return None under fp16, since an overflow is normal there: the
    scaler skips the step and lowers its scale.
    """
    if run.step < run.args.core_start_step:
        freeze_core(optimizer)
    limit = math.inf if run.args.max_grad_norm is None else run.args.max_grad_norm
    norm = run.accelerator.clip_grad_norm_(model.parameters(), limit)
    if norm is None or run.accelerator.scaler is not None:
        return None
    norm = torch.as_tensor(norm).detach()
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _report(run: Run, bar: tqdm, optimizer: AcceleratedOptimizer) -> None:
    (total, number), run.unlogged = run.unlogged, [0.0, 0]
    values = {"loss": total / number}
    rates = {group.get("name", "adapter"): group["lr"] for group in optimizer.param_groups}
    values["learning_rate"] = rates["adapter"]
    if "core" in rates:
        values["core_learning_rate"] = rates["core"]
    run.log(values)
    bar.set_postfix(loss=f"{values['loss']:.3g}", lr=f"{values['learning_rate']:.3g}")


def _diverged(run: Run, step: int, what: str) -> TrainingDiverged:
    return TrainingDiverged(
        f"{what} in step {step}; training stops and nothing is overwritten. Lower --learning_rate or "
        "--core_learning_rate, lengthen --lr_warmup_steps, or take bf16 in place of fp16. "
        f"{last_checkpoint(run.folder)}"
    )


def _save_if_due(run: Run) -> bool:
    """Write a checkpoint if one is due at this step. Return True if it was written."""
    every = run.args.checkpointing_steps
    is_due = _due(run.step, every) or (every is not None and run.step == run.total_steps)
    if is_due:
        run.save_checkpoint()
    return is_due


def _stop(run: Run, number: int, is_saved: bool) -> None:
    if not is_saved:
        run.save_checkpoint()
    if run.is_main:
        logger.warning("stopped after step %d. %s", run.step, last_checkpoint(run.folder))
    run.close()
    raise SystemExit(128 + number)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


# ---------------------------------------------------------------- Ctrl-C and SIGTERM


_ECHO = 2.0  # seconds; a second SIGINT within this time is the launcher's copy of the first


class InterruptRequest:
    """Record Ctrl-C and SIGTERM inside the context: `with InterruptRequest() as request: …`.

    `request.signal` is the signal received, SIGINT (Ctrl-C) or SIGTERM, or else 0. A second Ctrl-C
    stops the program at once. Python allows signal handlers only in the main thread; in another
    thread `signal` is always 0.

    Args:
        processes: the number of processes of the run. All of them enter the context together.
    """

    def __init__(self, processes: int = 1) -> None:
        self.signal, self._came = 0, 0.0
        # gloo uses tensors on the CPU, so `of_any_process` doesn't wait for a device
        self._group = dist.new_group(backend="gloo") if processes > 1 else None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> InterruptRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def of_any_process(self) -> int:
        """Return the signal that any process received, or 0. All processes get the same answer."""
        if self._group is None:
            return self.signal
        numbers = torch.tensor([self.signal])
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self._group)
        return int(numbers)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal and time.monotonic() > self._came + _ECHO:
            raise KeyboardInterrupt
        if not self.signal:
            self.signal, self._came = number, time.monotonic()
