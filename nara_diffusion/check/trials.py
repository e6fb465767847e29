"""Short trainings of LoRA, of NaRA, and of NaRA without λ, which show what knowing λ gains.

    lora     NaRA whose core stays at C = I
    untold   NaRA whose core reads λ = 0.5 for every sample, in training and in measurement
    nara     NaRA

All three start from the same A, with B = 0, and see the same samples at the same noise levels with the same noise, by
the training's own loss, optimizer and learning rates. A core may speed up a training without knowing λ, so only what
NaRA gains over `untold` is due to λ. Each repeat draws A, core, samples, noise and held-out samples anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from tqdm.auto import tqdm

from nara_diffusion.cores.float32 import Core
from nara_diffusion.cores.registry import make_cores
from nara_diffusion.noise.level import core_holders
from nara_diffusion.training.loop import StepLoss
from nara_diffusion.training.optimization import build_optimizer, build_scheduler, hold_core

ADAPTER = "default"
ARMS = ("lora", "untold", "nara")
WARMUP = 0.05  # the share of warm-up steps

Loss = Callable[[Sequence[int]], StepLoss]
"""Positions in the stream of samples → their losses."""


@dataclass(frozen=True)
class CheckTask:
    """The parts of a training that the check runs.

    Attributes:
        model: with the NaRA adapter that `published` describes; all else is frozen.
        config: the configuration of that adapter.
        args: the arguments of learning rates and optimizer, as `published` returns them.
        loss: of positions in the stream of samples, as in training.
        held_out: the same for samples, or for noise, that aren't trained on.
        step_samples: the number of samples of an optimizer step, a multiple of args.train_batch_size, a forward's.
    """

    model: nn.Module
    config: Any
    args: Any
    loss: Loss
    held_out: Loss
    step_samples: int

    def batches(self, positions: range) -> list[range]:
        """The positions of each forward."""
        return chunks(positions, self.args.train_batch_size)


@dataclass(frozen=True)
class CheckSettings:
    """Optimizer steps of a short training, held-out samples of a repeat (rounded up to batches), most repeats."""

    steps: int = 100
    samples: int = 100
    repeats: int = 6


@dataclass(frozen=True)
class Repeat:
    """λ (n,) of the held-out samples, and {"base" or one of `ARMS`: their losses (n,)}."""

    noise_level: Tensor
    losses: dict[str, Tensor]


def published(args: Any) -> Any:
    """A copy of the arguments of a train script, with the published NaRA of the same rank, scale and targets in place
    of their adapter, and with the schedule of a short training."""
    kept = ("use_rslora", "core_hidden_dims", "noise_embedding", "noise_embedding_dim", "fourier_scale")
    options = {name: value for name, value in args.adapter_options.items() if name in kept}
    changed = copy(args)
    vars(changed).update(adapter="nara", core_type="hypernetwork", lora_dropout=0.0, adapter_options=options)
    vars(changed).update(core_start_step=0, lr_scheduler="cosine", lr_warmup_steps=WARMUP)
    return changed


def trials(task: CheckTask, settings: CheckSettings, progress: bool = True) -> Iterator[Repeat]:
    """Yield the repeats, each of which is trained when it is asked for.

    Raises:
        ValueError: a loss is NaN or infinite.
    """
    trained = settings.steps * task.step_samples
    size = task.args.train_batch_size
    measured = math.ceil(settings.samples / size) * size
    total = len(ARMS) * trained + (1 + len(ARMS)) * measured  # samples in the forwards of a repeat
    for number in range(settings.repeats):
        training = range(number * trained, (number + 1) * trained)
        first = settings.repeats * trained + number * measured
        losses: dict[str, Tensor] = {}
        with tqdm(total=total, desc=f"repeat {number + 1}", unit="sample", disable=not progress) as bar:
            for arm in ("base", *ARMS):
                restart(task, number)
                with _one_level(task.model) if arm == "untold" else nullcontext():
                    if arm != "base":
                        _train(task, settings, training, arm, bar)
                    noise_level, losses[arm] = _measure(task, range(first, first + measured), bar)
        yield Repeat(noise_level, losses)


def restart(task: CheckTask, number: int) -> None:
    """Draw A and the cores anew, from the seed and the `number` of the repeat; B = 0 and C = I."""
    torch.manual_seed(task.args.seed * 1_000_003 + number)
    for layer in task.model.modules():
        if isinstance(layer, LoraLayer):
            layer.reset_lora_parameters(ADAPTER, True)
    for holder in core_holders(task.model):
        cores = holder.cores[ADAPTER]
        cores.load_state_dict(make_cores(task.config, {group: core.rank for group, core in cores.items()}).state_dict())


def _one_level(model: nn.Module) -> ExitStack:
    """Inside this context, the cores read λ = 0.5 whatever the noise is."""

    def replaced(core: nn.Module, signals: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(None if signal is None else torch.full_like(signal, 0.5) for signal in signals)

    stack = ExitStack()
    for core in model.modules():
        if isinstance(core, Core):
            stack.enter_context(core.register_forward_pre_hook(replaced))
    return stack


def _train(task: CheckTask, settings: CheckSettings, positions: range, arm: str, bar: tqdm) -> None:
    parameters = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(task.model, task.args)
    schedule = build_scheduler(optimizer, task.args, settings.steps)
    bar.set_postfix_str(arm)
    for group in chunks(positions, task.step_samples):
        for chosen in task.batches(group):
            (task.loss(chosen).loss * len(chosen) / len(group)).backward()
            bar.update(len(chosen))
        if arm == "lora":
            hold_core(optimizer)
        if task.args.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, task.args.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def _measure(task: CheckTask, positions: range, bar: tqdm) -> tuple[Tensor, Tensor]:
    """λ (n,) and the losses (n,) of held-out samples."""
    steps = []
    task.model.eval()
    for chosen in task.batches(positions):
        steps.append(task.held_out(chosen))
        bar.update(len(chosen))
    task.model.train()
    losses = torch.cat([step.per_sample for step in steps]).double().cpu()
    if not losses.isfinite().all():
        raise ValueError(
            "the loss is no longer a finite number: lower the learning rate, or use bfloat16 or float32, not float16."
        )
    return torch.cat([step.noise_level for step in steps]).float().cpu(), losses


def chunks(positions: range, size: int) -> list[range]:
    return [positions[start : start + size] for start in range(0, len(positions), size)]
