"""What a run teaches: images of a subject (`subject`), or few-step sampling (`distill`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from peft import PeftConfig
from torch.utils.data import Dataset

from .families import Family
from .few_steps import StudentLoss
from .fidelity import Evaluation, Measurement
from .training_step import TrainingStep


@dataclass(frozen=True)
class Task:
    """A base model without its adapter, with samples, a loss and an evaluation."""

    pipe: DiffusionPipeline
    family: Family  # with the settings of the run
    config: PeftConfig  # of the adapter
    loss: TrainingStep | StudentLoss
    samples: Dataset  # indexed by position, as a `ShuffledStream`
    collate: Callable[[list], Any]  # samples → a batch of `loss`
    count: int  # samples of an epoch
    evaluation: Evaluation
    facts: Mapping[str, str]  # {what: value} for the log and the model card
    # measurements before and after → more arguments of `training.report.finish`
    report: Callable[[Measurement, Measurement], dict[str, Any]]
