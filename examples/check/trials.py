"""Train NaRA and other adapters briefly, to measure how much λ helps.

    base     the model without an adapter; it isn't trained
    lora     NaRA with a core that stays at C = I
    untold   NaRA with λ = 0.5 for every sample, in training and in measurement
    time     a LoRA on NaRA's layers and on the layers that read the timestep, if there are any
    token    a LoRA on NaRA's layers, and the digit ⌊10 λ⌋ at the end of the prompt, if it fits
    nara     NaRA

`time` and `token` are cheap ways to give the model λ. Their rank is chosen so that they have about
as many parameters as NaRA. The others start from the same A, with B = 0. All see the same samples
at the same noise levels with the same noise, and use the training's own loss, optimizer and
learning rates. A core may speed up a training without knowing λ, so only NaRA's gain over `untold`
is due to λ. In each repeat, A, core, samples, noise and held-out samples are drawn anew.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from tqdm.auto import tqdm

from nara_diffusion import NaraConfig
from nara_diffusion.cores.core import Core
from nara_diffusion.cores.registry import make_cores
from nara_diffusion.dreambooth.denoiser import adapt, text_config
from nara_diffusion.noise.context import core_holders
from nara_diffusion.training.adapters import adapter_config
from nara_diffusion.training.engines import (
    build_lr_scheduler,
    build_optimizer,
    freeze_core,
    is_core_parameter,
)
from nara_diffusion.training.loop import StepLoss
from nara_flags.training import TrainingArguments

ADAPTER, CHEAP = "default", "cheap"  # the names of NaRA's adapter and of the cheap way's adapter
TITLES = {
    "base": "base",
    "lora": "LoRA",
    "untold": "NaRA without λ",
    "time": "LoRA + time layers",
    "token": "LoRA + λ token",
    "nara": "NaRA",
}
WAYS = ("time", "token")  # the cheap ways; a task has at most one
HELD_OUT = "Held-out losses"
NO_CHEAP = "no time layers are left to adapt, and no place for a token"
Loss = Callable[[Sequence[int]], StepLoss]
"""Positions in the stream of samples → their losses."""
Arguments = TypeVar("Arguments", bound=TrainingArguments)


@dataclass(frozen=True)
class CheckTask:
    """The parts of a training to check, and the number of steps and samples that the check uses."""

    model: nn.Module  # with NaRA as in `published`, perhaps a LoRA `CHEAP`; else frozen
    config: NaraConfig  # the configuration of that NaRA
    args: TrainingArguments  # learning rates and optimizer, as `published` returns them
    loss: Loss  # the loss at positions in the stream of samples, as in training
    held_out: Loss  # the loss on samples, or noise, outside of the training
    step_samples: int  # samples of an optimizer step, a multiple of args.train_batch_size
    with_token: tuple[Loss, Loss] | None = None  # `loss` and `held_out` with the λ token, if possible
    steps: int = 100  # optimizer steps of each training
    repeats: int = 6  # the largest number of repeats
    samples: int = 100  # held-out samples of a repeat, in whole batches
    measured: str = HELD_OUT  # what the report calls the losses of `held_out`
    no_cheap: str = NO_CHEAP  # why there is no cheap way, if there is none

    @property
    def arms(self) -> list[str]:
        """Return the arms of this task."""
        cheap = None
        if self.with_token:
            cheap = "token"
        elif CHEAP in core_holders(self.model)[0].cores:
            cheap = "time"
        return [arm for arm in TITLES if arm not in WAYS or arm == cheap]


class Repeat(NamedTuple):
    """The measurement of one repeat: λ (n,) of held-out samples, and their losses (n,) by arm."""

    noise_level: Tensor  # λ (n,) of the held-out samples
    losses: dict[str, Tensor]  # {arm: their losses (n,)}, for the task's arms


def published(args: Arguments) -> Arguments:
    """Return a copy of a train script's arguments for the check.

    In the copy, the adapter is the published NaRA of the same rank, scale and targets, and the
    schedule is that of a short training.
    """
    names = (
        "use_rslora",
        "core_hidden_dims",
        "noise_embedding",
        "noise_embedding_dim",
        "fourier_scale",
    )
    options = {name: value for name, value in args.adapter_options.items() if name in names}
    changed = copy(args)
    changed.adapter, changed.core_type = "nara", "hypernetwork"
    changed.lora_dropout, changed.adapter_options = 0.0, options
    changed.core_start_step = 0
    changed.lr_scheduler, changed.lr_warmup_steps = "cosine", 0.05
    return changed


def trials(task: CheckTask, progress: bool = True, start: int = 0) -> Iterator[Repeat]:
    """Yield the repeats from number `start` on, each trained on demand.

    Raises:
        ValueError: a loss is not finite.
    """
    trained = task.steps * task.step_samples
    size = task.args.train_batch_size
    measured = math.ceil(task.samples / size) * size
    for number in range(start, task.repeats):
        first = task.repeats * trained + number * measured
        held_out_positions = range(first, first + measured)
        positions = range(number * trained, (number + 1) * trained)
        losses: dict[str, Tensor] = {}
        for arm in task.arms:
            restart(task, number, CHEAP if arm in WAYS else ADAPTER)
            loss, held_out = task.loss, task.held_out
            if arm == "token" and task.with_token:
                loss, held_out = task.with_token
            with _without_level(task.model, arm == "untold"):
                if arm != "base":
                    _train(task, arm, loss, positions, progress)
                noise_level, losses[arm] = _measure(task, held_out, held_out_positions)
        yield Repeat(noise_level, losses)


def restart(task: CheckTask, number: int, adapter: str = ADAPTER) -> None:
    """Activate `adapter` with B = 0, C = I, and A and cores drawn from the seed and `number`."""
    torch.manual_seed(task.args.seed * 1_000_003 + number)
    for layer in task.model.modules():
        if isinstance(layer, LoraLayer):
            layer.set_adapter(adapter)
            layer.reset_lora_parameters(adapter, True)
    if adapter != ADAPTER:
        return
    for holder in core_holders(task.model):
        cores = holder.cores[ADAPTER]
        ranks = {group: core.rank for group, core in cores.items()}
        cores.load_state_dict(make_cores(task.config, ranks).state_dict())


@contextmanager
def _without_level(model: nn.Module, is_active: bool) -> Iterator[None]:
    """Make every core read λ = 0.5 at any noise, if `is_active`."""
    with ExitStack() as changed:
        for module in model.modules():
            if is_active and isinstance(module, Core):
                changed.enter_context(module.register_forward_pre_hook(_half))
        yield


def _half(core: nn.Module, levels: tuple[Tensor]) -> tuple[Tensor]:
    """Replace λ with 0.5, as a forward pre-hook of a core."""
    return (torch.full_like(levels[0], 0.5),)


def _train(task: CheckTask, arm: str, loss: Loss, positions: range, progress: bool) -> None:
    parameters = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(task.model, task.args)
    schedule = build_lr_scheduler(optimizer, task.args, task.steps)
    groups = chunks(positions, task.step_samples)
    for group in tqdm(groups, desc=TITLES[arm], unit="step", leave=False, disable=not progress):
        for chosen in chunks(group, task.args.train_batch_size):
            share = len(chosen) / len(group)
            (loss(chosen).loss * share).backward()
        if arm == "lora":
            freeze_core(optimizer)
        if task.args.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, task.args.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def _measure(task: CheckTask, held_out: Loss, positions: range) -> tuple[Tensor, Tensor]:
    """Return λ (n,) and the losses (n,) of held-out samples."""
    task.model.eval()
    steps = [held_out(chosen) for chosen in chunks(positions, task.args.train_batch_size)]
    task.model.train()
    losses = torch.cat([step.per_sample for step in steps]).double().cpu()
    if not losses.isfinite().all():
        raise ValueError("the loss is no longer a finite number: lower the learning rate, or don't use float16.")
    return torch.cat([step.noise_level for step in steps]).float().cpu(), losses


def chunks(positions: range, size: int) -> list[range]:
    """Return `positions` in chunks of `size`. The last chunk may be shorter."""
    return [positions[start : start + size] for start in range(0, len(positions), size)]


# ---------------------------------------------------------------------- adapters


def nara_config(args: TrainingArguments, noise_convention: str, **fields: Any) -> NaraConfig:
    """Return the configuration of the NaRA that `published` arguments describe."""
    config = adapter_config(args, noise_convention=noise_convention, **fields)
    assert isinstance(config, NaraConfig)
    return config


def add_cheap(model: nn.Module, config: NaraConfig, further: Sequence[str] = ()) -> None:
    """Add the LoRA `CHEAP`, with about as many parameters as NaRA, to a model with a NaRA.

    Args:
        model: the model with NaRA.
        config: the configuration of that NaRA.
        further: names of linear layers to adapt in addition to NaRA's.
    """
    root = core_holders(model)[0].root
    modules = dict(root.named_modules())
    all_parameters = 0  # number of NaRA's parameters
    of_layers = 0  # number of parameters in its A and B
    for name, parameter in root.named_parameters():
        if parameter.requires_grad:
            all_parameters += parameter.numel()
            if not is_core_parameter(name):
                of_layers += parameter.numel()
    of_a_rank = of_layers / config.r
    for name in further:
        of_a_rank += modules[name].in_features + modules[name].out_features
    rank = max(1, round(all_parameters / of_a_rank))
    adapted = [name for name, module in modules.items() if isinstance(module, LoraLayer)]
    layers = "|".join(map(re.escape, [*adapted, *further]))
    lora = replace(
        text_config(config),
        r=rank,
        lora_alpha=config.lora_alpha * rank / config.r,
        target_modules=layers,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        adapt(root, lora, CHEAP)
