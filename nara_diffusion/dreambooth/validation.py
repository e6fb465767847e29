"""Validation during training: save, load as a user does, measure the loss and sample; training goes on untouched."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType
from PIL.Image import Image

from nara_diffusion.dreambooth.evaluation.before_after import ValidationLoss, validation_losses
from nara_diffusion.dreambooth.evaluation.grid import write_grid
from nara_diffusion.dreambooth.evaluation.sampling import SampleSettings, sample_images
from nara_diffusion.training.checkpoints.folders import save_adapter
from nara_diffusion.training.run import Run

from .formats import adapter_loaded, write_adapter


@dataclass(frozen=True)
class Validation:
    """`validation()` is what `train` calls: the losses to log, after a sheet of samples was written and logged.

    Attributes:
        run: of the training, opened.
        model: that is trained, as accelerate wrapped it.
        sampler: a pipeline without adapters.
        settings: of the samples.
        loss: what is measured.
        references: images of the subject.
    """

    run: Run
    model: torch.nn.Module
    sampler: Any
    settings: SampleSettings
    loss: ValidationLoss
    references: Sequence[Image]

    def __call__(self) -> dict[str, float]:
        accelerator = self.run.accelerator
        folder = self.run.folder / ".partial-validation"
        devices = [accelerator.device] if accelerator.device.type == "cuda" else []
        folder.mkdir(exist_ok=True)
        try:
            save_adapter(accelerator, self.model, folder, write_adapter)
            with torch.random.fork_rng(devices), adapter_loaded(self.sampler, folder):
                losses = validation_losses(accelerator, self.sampler, self.loss)
                images = sample_images(self.sampler, self.settings, accelerator, desc="validation samples")
            accelerator.wait_for_everyone()
        finally:
            if accelerator.is_main_process:
                shutil.rmtree(folder, ignore_errors=True)
        if accelerator.is_main_process:
            self._write(images)
        return losses

    def _write(self, images: Sequence[Image]) -> None:
        step = self.run.step
        path = self.run.folder / "validation" / f"step-{step}.png"
        path.parent.mkdir(exist_ok=True)
        write_grid(path, self.settings.prompts, {f"step {step}": images}, self.references)
        for tracker in self.run.accelerator.trackers:
            log_trackers_images(tracker, images, self.settings, step)


def log_trackers_images(tracker: Any, images: Sequence[Image], settings: SampleSettings, step: int) -> None:
    """Hands samples to a tracker of accelerate that takes images, one gallery for each prompt."""
    if not hasattr(tracker, "log_images"):
        return
    each = settings.images_per_prompt
    for number, prompt in enumerate(settings.prompts):
        arrays = np.stack([np.asarray(image) for image in images[number * each : (number + 1) * each]])  # (n, h, w, 3)
        options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({f"validation: {prompt}": arrays}, step=step, **options)


def refuse_sharding(run: Run) -> None:
    """Sampling during training needs the whole model on each process."""
    kind = run.accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"this script trains where each device holds the whole model, and not with {kind.value}: launch it with "
            "--multi_gpu, and turn on gradient_checkpointing and mixed_precision bf16 if memory is short."
        )
