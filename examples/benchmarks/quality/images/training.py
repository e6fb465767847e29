"""Trains a copy of the UNet on one subject: order, noise and timesteps are functions of the seed, not of the method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nara_diffusion import noise_level
from nara_diffusion.dreambooth import collate_samples
from nara_diffusion.dreambooth.dataset import DreamBoothDataset, draw_indices
from nara_diffusion.dreambooth.families import SDXL
from nara_diffusion.dreambooth.objectives import build_objective
from nara_diffusion.dreambooth.training_step import TrainingStep
from nara_diffusion.training.optimization import build_optimizer, build_scheduler
from quality.images.held_out import SIZE
from quality.images.task import ImageTask
from quality.wrong_noise import while_evaluating


def shuffled_noise_levels(positions: Sequence[int], seed: int, levels: int, group_size: int) -> Tensor:
    """λ (b,) of samples at `positions`: drawn as the true ones are, and independent of them.

    A permutation within a batch of five would leave one sample in five its own λ.
    """
    options: dict[str, Any] = {"stratified": True, "group_size": group_size, "role": "shuffled"}
    return draw_indices(positions, torch.arange(levels), seed=seed, **options) / levels


class ControlledDenoiser(nn.Module):
    """The UNet as a training step calls it, told the λ of a control."""

    def __init__(self, unet: Any, control: str | None) -> None:
        super().__init__()
        self.unet, self.control = unet, control
        self.shuffled: Tensor | None = None  # λ of the next forward, for the control of that name

    def forward(self, sample: Tensor, timestep: Tensor, time_ids: Tensor, embeddings: tuple[Tensor, Tensor]) -> Tensor:
        shuffled = self.control == "shuffled"
        with noise_level(self.unet, self.shuffled) if shuffled else while_evaluating(self.unet, self.control):
            return SDXL.predict(self.unet, sample, timestep, time_ids, embeddings)


def train(task: ImageTask, unet: Any, args: Any, control: str | None, progress: bool = True) -> None:
    """Trains what in `unet` requires a gradient.

    Raises:
        ArithmeticError: the loss is no longer finite.
    """
    denoiser = ControlledDenoiser(unet, control).train()
    optimize(denoiser, _loss_of(task, denoiser, args), args, progress)
    unet.eval()


def optimize(denoiser: nn.Module, compute_loss: Callable[[int], Tensor], args: Any, progress: bool = False) -> None:
    """`args.max_train_steps` steps down `compute_loss(number of the step)`, over what in `denoiser` is trainable.

    Raises:
        ArithmeticError: the loss is no longer finite.
    """
    optimizer = build_optimizer(denoiser, args, fused=True)
    schedule = build_scheduler(optimizer, args, args.max_train_steps)
    parameters = [p for p in denoiser.parameters() if p.requires_grad]
    for number in tqdm(range(args.max_train_steps), desc="train", unit="step", leave=False, disable=not progress):
        loss = compute_loss(number)
        if not loss.isfinite():
            raise ArithmeticError(f"the loss became {loss.item()} in step {number + 1}: lower the learning rate.")
        loss.backward()
        if args.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


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
