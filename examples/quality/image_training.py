"""Trains a copy of the UNet on one subject: order, noise and timesteps are functions of the seed, not of the method."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nara_diffusion.dreambooth import collate_draws
from nara_diffusion.dreambooth.dataset import DreamBoothDataset
from nara_diffusion.dreambooth.denoiser import predict
from nara_diffusion.dreambooth.objectives import build_objective
from nara_diffusion.dreambooth.step import TrainingStep
from nara_diffusion.training.optimization import build_optimizer, build_scheduler, hold_core
from quality.image_controls import shuffled_noise_levels, while_training
from quality.image_task import SIZE, ImageTask


class ControlledDenoiser(nn.Module):
    """The UNet as a training step calls it, told the λ of a control."""

    def __init__(self, unet: Any, control: str | None) -> None:
        super().__init__()
        self.unet, self.control = unet, control
        self.shuffled: Tensor | None = None  # λ of the next forward, for the control of that name

    def forward(self, sample: Tensor, timestep: Tensor, time_ids: Tensor, embeddings: tuple[Tensor, Tensor]) -> Tensor:
        with while_training(self.unet, self.control, self.shuffled):
            return predict(self.unet, sample, timestep, time_ids, embeddings)


def train(task: ImageTask, unet: Any, args: Any, control: str | None, progress: bool = True) -> float:
    """Trains what is trainable in `unet`; returns the median milliseconds of a step.

    Raises:
        ArithmeticError: the loss is no longer finite.
    """
    denoiser = ControlledDenoiser(unet, control)
    optimizer = build_optimizer(denoiser, args)
    schedule = build_scheduler(optimizer, args, args.max_train_steps)
    batch_size = args.train_batch_size
    dataset = DreamBoothDataset(task.instances, [SIZE], batch_size=batch_size, seed=args.seed, flip=args.random_flip)
    step = TrainingStep(
        model=denoiser,
        objective=build_objective(task.pipe.scheduler, snr_gamma=args.snr_gamma),
        latents=task.latents,
        prompts=task.prompts,
        device=torch.device("cpu"),
        seed=args.seed,
        group_size=batch_size,
        stratified=args.stratified_timesteps,
        noise_offset=args.noise_offset,
    )
    parameters = [p for p in denoiser.parameters() if p.requires_grad]
    times = []
    denoiser.train()
    for number in tqdm(range(args.max_train_steps), desc="train", unit="step", leave=False, disable=not progress):
        positions = range(number * batch_size, (number + 1) * batch_size)
        denoiser.shuffled = shuffled_noise_levels(positions, args.seed, step.objective.levels, batch_size)
        started = time.perf_counter()
        loss = step(collate_draws([dataset[position] for position in positions])).loss
        if not loss.isfinite():
            raise ArithmeticError(f"the loss became {loss.item()} in step {number + 1}")
        loss.backward()
        if number < args.core_start_step:
            hold_core(optimizer)
        if args.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - started)
    denoiser.eval()
    return 1000 * median(times)
