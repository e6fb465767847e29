"""Short trainings of NaRA and of what it is compared with, which show what knowing λ gains, and by which way.

    base     the model without an adapter; it isn't trained
    lora     NaRA whose core stays at C = I
    untold   NaRA whose core reads λ = 0.5 for every sample, in training and in measurement
    time     a LoRA of NaRA's layers and of those that read the timestep, in models that have them
    token    a LoRA of NaRA's layers, and a digit at the end of the prompt, ⌊10 λ⌋, in models that have one
    nara     NaRA

`time` and `token` are the cheap ways of telling λ; their rank gives them about NaRA's number of parameters. The others
start from the same A, with B = 0. All see the same samples at the same noise levels with the same noise, by the
training's own loss, optimizer and learning rates. A core may speed up a training without knowing λ, so only what NaRA
gains over `untold` is due to λ. Each repeat draws A, core, samples, noise and held-out samples anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from tqdm.auto import tqdm

from nara_diffusion.cores.float32 import Core
from nara_diffusion.cores.registry import make_cores
from nara_diffusion.noise.level import core_holders
from nara_diffusion.training.loop import StepLoss
from nara_diffusion.training.optimization import build_lr_scheduler, build_optimizer, hold_core

ADAPTER, CHEAP = "default", "cheap"  # the adapters of NaRA and of a cheap way of telling λ
TITLES = {
    "base": "base",
    "lora": "LoRA",
    "untold": "NaRA without λ",
    "time": "LoRA + time layers",
    "token": "LoRA + λ token",
    "nara": "NaRA",
}
WAYS = ("time", "token")  # of which a task has one at most
HELD_OUT = "Held-out losses"
NO_CHEAP = "no time layers are left to adapt, and no place for a token"
Loss = Callable[[Sequence[int]], StepLoss]
"""Positions in the stream of samples → their losses."""


@dataclass(frozen=True)
class CheckTask:
    """The parts of a training that the check runs.

    Attributes:
        model: with the NaRA adapter that `published` describes, and perhaps a LoRA `CHEAP`; all else is frozen.
        config, args: of that NaRA; of learning rates and optimizer, as `published` returns them.
        loss, held_out: of positions in the stream of samples, as in training; of samples, or noise, not trained on.
        step_samples: the number of samples of an optimizer step, a multiple of args.train_batch_size, a forward's.
        told: `loss` and `held_out` of inputs with a token that says λ; None where there can be none.
        steps: of the optimizer, of each training. repeats: at most. samples: held out in a repeat, whole batches.
        measured: what the losses of `held_out` are called. no_cheap: why there is no cheap way, if there is none.
    """

    model: nn.Module
    config: Any
    args: Any
    loss: Loss
    held_out: Loss
    step_samples: int
    told: tuple[Loss, Loss] | None = None
    steps: int = 100
    repeats: int = 6
    samples: int = 100
    measured: str = HELD_OUT
    no_cheap: str = NO_CHEAP

    @property
    def arms(self) -> list[str]:
        """The arms that this task has."""
        cheap = (
            "token" if self.told else "time" if CHEAP in core_holders(self.model)[0].cores else None
        )
        return [arm for arm in TITLES if arm not in WAYS or arm == cheap]


class Repeat(NamedTuple):
    """λ (n,) of the held-out samples, and {arm: their losses (n,)} of the task's arms."""

    noise_level: Tensor
    losses: dict[str, Tensor]


def published(args: Any) -> Any:
    """A copy of the arguments of a train script, with the published NaRA of the same rank, scale and targets in place
    of their adapter, and with the schedule of a short training."""
    kept = (
        "use_rslora",
        "core_hidden_dims",
        "noise_embedding",
        "noise_embedding_dim",
        "fourier_scale",
    )
    options = {name: value for name, value in args.adapter_options.items() if name in kept}
    changed = copy(args)
    vars(changed).update(
        adapter="nara", core_type="hypernetwork", lora_dropout=0.0, adapter_options=options
    )
    vars(changed).update(core_start_step=0, lr_scheduler="cosine", lr_warmup_steps=0.05)
    return changed


def trials(task: CheckTask, progress: bool = True) -> Iterator[Repeat]:
    """Yield the repeats, each of which is trained when it is asked for. ValueError: a loss is NaN or infinite."""
    trained, size = task.steps * task.step_samples, task.args.train_batch_size
    measured = math.ceil(task.samples / size) * size
    cores = [module for module in task.model.modules() if isinstance(module, Core)]
    for number in range(task.repeats):
        first = task.repeats * trained + number * measured
        losses: dict[str, Tensor] = {}
        for arm in task.arms:
            restart(task, number, CHEAP if arm in WAYS else ADAPTER)
            loss, held_out = (arm == "token" and task.told) or (task.loss, task.held_out)
            with ExitStack() as changed:
                for core in cores if arm == "untold" else ():
                    changed.enter_context(core.register_forward_pre_hook(_half))
                if arm != "base":
                    _train(
                        task, arm, loss, range(number * trained, (number + 1) * trained), progress
                    )
                noise_level, losses[arm] = _measure(task, held_out, range(first, first + measured))
        yield Repeat(noise_level, losses)


def restart(task: CheckTask, number: int, adapter: str = ADAPTER) -> None:
    """Activate `adapter`, and draw its A and cores from the seed and the `number` of the repeat; B = 0 and C = I."""
    torch.manual_seed(task.args.seed * 1_000_003 + number)
    for layer in task.model.modules():
        if isinstance(layer, LoraLayer):
            layer.set_adapter(adapter)
            layer.reset_lora_parameters(adapter, True)
    for holder in core_holders(task.model) if adapter == ADAPTER else ():
        cores = holder.cores[ADAPTER]
        cores.load_state_dict(
            make_cores(
                task.config, {group: core.rank for group, core in cores.items()}
            ).state_dict()
        )


def _half(core: nn.Module, levels: tuple[Tensor]) -> tuple[Tensor]:
    """A hook by which a core reads λ = 0.5 whatever the noise is."""
    return (torch.full_like(levels[0], 0.5),)


def _train(task: CheckTask, arm: str, loss: Loss, positions: range, progress: bool) -> None:
    parameters = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(task.model, task.args)
    schedule = build_lr_scheduler(optimizer, task.args, task.steps)
    groups = chunks(positions, task.step_samples)
    for group in tqdm(groups, desc=TITLES[arm], unit="step", leave=False, disable=not progress):
        for chosen in chunks(group, task.args.train_batch_size):
            (loss(chosen).loss * len(chosen) / len(group)).backward()
        if arm == "lora":
            hold_core(optimizer)
        if task.args.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, task.args.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def _measure(task: CheckTask, held_out: Loss, positions: range) -> tuple[Tensor, Tensor]:
    """λ (n,) and the losses (n,) of held-out samples."""
    task.model.eval()
    steps = [held_out(chosen) for chosen in chunks(positions, task.args.train_batch_size)]
    task.model.train()
    losses = torch.cat([step.per_sample for step in steps]).double().cpu()
    if not losses.isfinite().all():
        raise ValueError(
            "the loss is no longer a finite number: lower the learning rate, or use no float16."
        )
    return torch.cat([step.noise_level for step in steps]).float().cpu(), losses


def chunks(positions: range, size: int) -> list[range]:
    return [positions[start : start + size] for start in range(0, len(positions), size)]
