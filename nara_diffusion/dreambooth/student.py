"""The loss and the measurements of a student that samples in K steps.

From the teacher's latents z_k, the student predicts y_k in one call, without guidance. The target
is the prediction that leads to z_(k+1) (`few_steps.landing`):

    loss = mean over samples of (1 / e_k) · mean (prediction − y_k)²

e_k is the error of the base model at step k, so that all steps have the same weight.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL.Image import Image
from torch import Tensor, nn

from nara_diffusion.loaders.tensor_files import is_nara
from nara_diffusion.noise.timesteps import TimestepNoise
from nara_diffusion.training.engines import split_across_processes

from .caches import PromptCache
from .denoiser import ADAPTER, LORA_WEIGHTS, freeze_adapter
from .encoders import Images
from .families import placed
from .few_steps import Level, landings
from .fidelity import Evaluation
from .pipelines import modules_of
from .training_step import DreamBoothLoss
from .trajectories import Teacher


@dataclass(frozen=True)
class StudentLoss:
    """The loss of the student: `loss(batch)`, for a batch from `collate_segments`."""

    model: nn.Module  # an `AdaptedDenoiser`, as accelerate wrapped it
    trajectories: Tensor  # (n, K + 1, c, h, w), float32 on the CPU
    prompts: Sequence[str]  # of each trajectory
    levels: Sequence[Level]  # K + 1
    base_errors: Tensor  # e (K,)
    source: TimestepNoise  # λ of a timestep
    embeddings: PromptCache
    teacher: Teacher  # its time ids and device

    def __call__(self, batch: Mapping[str, list[int]]) -> DreamBoothLoss:
        numbers, steps = torch.tensor(batch["trajectory"]), torch.tensor(batch["step"])
        z, target = self.pairs(numbers, steps)
        timestep = self.timesteps(steps)
        there = partial(Tensor.to, device=self.teacher.device, non_blocking=True)
        given = placed(self.embeddings.get(self.prompts_of(numbers)), self.teacher.device)
        ids = self.teacher.time_ids(len(z))
        prediction = self.model(there(z), there(timestep), ids, embeddings=given)
        errors = (prediction.float() - there(target)).square().flatten(1).mean(1)
        losses = errors / there(self.base_errors[steps])
        return DreamBoothLoss(losses.mean(), losses, self.source.noise_level(timestep))

    def pairs(self, numbers: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Return z_k and the targets y_k (b, c, h, w) of trajectories (b,) at steps (b,)."""
        here, there = self.trajectories[numbers, steps], self.trajectories[numbers, steps + 1]
        a, b = landings(self.levels)[steps].T[:, :, None, None, None]
        return here, a * here + b * there

    def prompts_of(self, numbers: Tensor) -> list[str]:
        """Return the prompts of trajectories (b,)."""
        return [self.prompts[int(number)] for number in numbers]

    def timesteps(self, steps: Tensor) -> Tensor:
        """Return the timesteps (b,) of steps (b,), as the denoiser takes them."""
        values = torch.tensor([level.timestep for level in self.levels])[steps]
        return values if self.teacher.family.is_flow else values.long()


@dataclass(frozen=True)
class StepErrors:
    """The errors of a pipeline on held-out trajectories, relative to the base. A `LossCurve`."""

    loss: StudentLoss  # of the held-out trajectories
    batch_size: int

    @property
    def noise_levels(self) -> Tensor:
        """λ (K,)."""
        steps = torch.arange(len(self.loss.levels) - 1)
        return self.loss.source.noise_level(self.loss.timesteps(steps))

    def curve(self, pipe: Any, accelerator: Accelerator) -> Tensor:
        """Return the errors (K, n) of `pipe` as it is, on every process."""
        return self.errors(pipe, accelerator) / self.loss.base_errors[:, None]

    def errors(self, pipe: Any, accelerator: Accelerator) -> Tensor:
        """Return the mean squared errors (K, n) of the prediction."""

        def work(steps: Sequence[int]) -> list[list[float]]:
            return [self._at(pipe, step) for step in steps]

        count = len(self.loss.levels) - 1
        return torch.tensor(split_across_processes(accelerator, count, work))

    @torch.no_grad()
    def end_error(self, pipe: Any) -> float:
        """Return the mean squared distance between the final latents and those of the teacher."""
        loss, student = self.loss, replace(self.loss.teacher, pipe=pipe, guidance_scale=1.0)
        distances = []
        for numbers in torch.arange(len(loss.prompts)).split(self.batch_size):
            prompts = loss.prompts_of(numbers)
            end = student.sample(loss.trajectories[numbers, 0], prompts, loss.levels)[-1].cpu()
            distances += (end - loss.trajectories[numbers, -1]).square().flatten(1).mean(1).tolist()
        return sum(distances) / len(distances)

    @torch.no_grad()
    def _at(self, pipe: Any, step: int) -> list[float]:
        loss, student = self.loss, replace(self.loss.teacher, pipe=pipe, guidance_scale=1.0)
        errors: list[float] = []
        for numbers in torch.arange(len(loss.prompts)).split(self.batch_size):
            z, target = loss.pairs(numbers, torch.full_like(numbers, step))
            given = placed(student.embeddings(loss.prompts_of(numbers)), student.device)
            found = student.predict(z.to(student.device), loss.levels[step], given).cpu()
            errors += (found - target).square().flatten(1).mean(1).tolist()
        return errors


@dataclass(frozen=True)
class StudentEvaluation(Evaluation):
    """Measure sampling in K steps without guidance.

    `references` has a teacher's sample for each student's sample, with the same prompt and seed.
    """

    beside: str | None = None  # an adapter of `pipe` that stays active

    def loaded(self, folder: Path | None) -> AbstractContextManager[None]:
        """Return a context with the adapter in `folder` loaded next to the adapter `beside`."""
        if self.beside is None:
            return super().loaded(folder)
        return loaded_beside(self.pipe, folder, self.beside)

    @property
    def subject(self) -> dict[str, Sequence[Image]]:
        """Rows of a sheet, {title: the teacher's samples}."""
        return {"the teacher": self.references}

    def _similarity(self, images: Images, references: Images | None) -> float | None:
        """Return the mean cosine of student and teacher samples; None without an encoder."""
        if self.similarity is None or references is None:
            return None
        pairs = F.cosine_similarity(
            self.similarity.images(images), self.similarity.images(references)
        )
        return pairs.mean().item()


# ---------------------------------------------------------------------- beside the user's adapter


def load_own(pipe: Any, path: str, name: str) -> None:
    """Load the user's adapter, a LoRA or a NaRA, into `pipe` as `name`, frozen."""
    if is_nara(Path(path).expanduser()):
        pipe.load_nara_weights(path, adapter_name=name)
    else:
        pipe.load_lora_weights(path, adapter_name=name)
    for module in modules_of(pipe).values():
        freeze_adapter(module, name)


def contents_of(pipe: Any, name: str) -> list[str]:
    """Return everything that the output of the adapter `name` depends on, for a digest."""
    texts = []
    for component, module in modules_of(pipe).items():
        config = getattr(module, "peft_config", {}).get(name)
        if config is None:
            continue
        texts.append(component + json.dumps(config.to_dict(), sort_keys=True, default=_as_text))
        for key, tensor in module.state_dict().items():
            if name in key.split("."):
                values = tensor.detach().cpu().double().numpy().tobytes()
                texts += [key, hashlib.sha256(values).hexdigest()]
    return texts


def _as_text(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


@contextmanager
def loaded_beside(pipe: Any, folder: Path | None, name: str) -> Iterator[None]:
    """Load the adapter in `folder` inside the context. The adapter `name` stays active."""
    if folder is None:
        yield
        return
    is_lora = (folder / LORA_WEIGHTS).is_file()
    load = pipe.load_lora_weights if is_lora else pipe.load_nara_weights
    with warnings.catch_warnings():  # two adapters are intended
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        load(folder, adapter_name=ADAPTER)
    try:
        pipe.set_adapters([name, ADAPTER])
        yield
    finally:
        pipe.delete_adapters(ADAPTER)
        pipe.set_adapters(name)
