"""Trains a copy of the UNet on one subject: order, noise and timesteps are functions of the seed, not of the method."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from peft import AdaLoraModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from nara_diffusion.dreambooth import collate_samples
from nara_diffusion.dreambooth.data.dataset import DreamBoothDataset
from nara_diffusion.dreambooth.denoiser import predict
from nara_diffusion.dreambooth.loss import TrainingStep
from nara_diffusion.dreambooth.objectives import build_objective
from nara_diffusion.training.adapters.adalora import allocate_ranks, orthogonality
from nara_diffusion.training.optimization import build_optimizer, build_scheduler, hold_core
from quality.images.controls import shuffled_noise_levels, while_training
from quality.images.methods import AdaptedUNet
from quality.images.subjects import SIZE
from quality.images.task import ImageTask
from quality.step_cost import Step
from quality.step_memory import step_memory_mib


class ControlledDenoiser(nn.Module):
    """The UNet as a training step calls it, told the λ of a control."""

    def __init__(self, unet: Any, control: str | None) -> None:
        super().__init__()
        self.unet, self.control = unet, control
        self.shuffled: Tensor | None = None  # λ of the next forward, for the control of that name

    def forward(self, sample: Tensor, timestep: Tensor, time_ids: Tensor, embeddings: tuple[Tensor, Tensor]) -> Tensor:
        with while_training(self.unet, self.control, self.shuffled):
            return predict(self.unet, sample, timestep, time_ids, embeddings)


@dataclass(frozen=True)
class Trained:
    """Attributes: `step_ms` is the median step's time; `peak_memory_mib` that of a step, counted in tensors."""

    step_ms: float
    peak_memory_mib: float


def train(task: ImageTask, adapted: AdaptedUNet, args: Any, control: str | None, progress: bool = True) -> Trained:
    """Trains what in `adapted` requires a gradient.

    Raises:
        ArithmeticError: the loss is no longer finite.
    """
    memory = peak_memory(task, adapted, args, control)
    times = [step.seconds for step in steps(task, adapted, args, control, progress)]
    adapted.unet.eval()
    return Trained(1000 * median(times), memory)


def peak_memory(task: ImageTask, adapted: AdaptedUNet, args: Any, control: str | None = None) -> float:
    """MiB of the first step, counted in tensors; nothing is trained."""
    denoiser = ControlledDenoiser(adapted.unet, control).train()
    compute_loss = _loss_of(task, denoiser, args)
    return step_memory_mib(denoiser, lambda: compute_loss(0))


def steps(
    task: ImageTask, adapted: AdaptedUNet, args: Any, control: str | None = None, progress: bool = False
) -> Iterator[Step]:
    """The training itself, a step each time that one is asked for; see `train`."""
    denoiser = ControlledDenoiser(adapted.unet, control).train()
    yield from optimize(denoiser, _loss_of(task, denoiser, args), adapted.adalora, args, progress)


def optimize(
    denoiser: nn.Module,
    compute_loss: Callable[[int], Tensor],
    adalora: list[AdaLoraModel],
    args: Any,
    progress: bool = False,
) -> Iterator[Step]:
    """`args.max_train_steps` steps down `compute_loss(number of the step)`, over what in `denoiser` is trainable.

    Raises:
        ArithmeticError: the loss is no longer finite.
    """
    optimizer = build_optimizer(denoiser, args, fused=True)
    schedule = build_scheduler(optimizer, args, args.max_train_steps)
    parameters = [p for p in denoiser.parameters() if p.requires_grad]
    for number in tqdm(range(args.max_train_steps), desc="train", unit="step", leave=False, disable=not progress):
        started = time.perf_counter()
        loss = compute_loss(number) + orthogonality(adalora)
        value = loss.item()
        if not loss.isfinite():
            raise ArithmeticError(f"the loss became {value} in step {number + 1}: lower the learning rate.")
        loss.backward()
        if number < args.core_start_step:
            hold_core(optimizer)
        if args.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        schedule.step()
        allocate_ranks(adalora, number + 1)
        optimizer.zero_grad()
        yield Step(value, time.perf_counter() - started)


def _loss_of(task: ImageTask, denoiser: ControlledDenoiser, args: Any) -> Callable[[int], Tensor]:
    """The loss of step `number`: data, timesteps and noise follow from the seed and the number alone."""
    size = args.train_batch_size
    dataset = DreamBoothDataset(task.instances, [SIZE], batch_size=size, seed=args.seed, flip=args.random_flip)
    step = TrainingStep(
        model=denoiser,
        objective=build_objective(task.pipe.scheduler, snr_gamma=args.snr_gamma),
        latents=task.latents,
        prompts=task.prompts,
        device=torch.device("cpu"),
        seed=args.seed,
        group_size=size,
        stratified=args.stratified_timesteps,
        noise_offset=args.noise_offset,
    )

    def loss(number: int) -> Tensor:
        positions = range(number * size, (number + 1) * size)
        denoiser.shuffled = shuffled_noise_levels(positions, args.seed, step.objective.levels, size)
        return step(collate_samples([dataset[position] for position in positions])).loss

    return loss
