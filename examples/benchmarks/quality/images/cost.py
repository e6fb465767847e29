"""What a step of a method costs beside one of LoRA, on the image benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from quality.images.methods import adapted
from quality.images.runs import check, description, trainable_parameters
from quality.images.settings import arguments
from quality.images.task import load_task
from quality.images.training import peak_memory, steps
from quality.jobs import COST
from quality.step_cost import BASELINE, Training, cost_record


def image_cost(subject: str, method: str, settings: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    """The record of `method`.

    Args:
        settings: as `image_records` takes them.
        shared: those of them that LoRA has as well.
    """
    check(method, None)
    return cost_record(_training(subject, method, dict(settings)), _training(subject, BASELINE, dict(shared)))


def _training(subject: str, method: str, settings: dict[str, Any]) -> Training:
    args, task = arguments(subject, method, 0, settings), load_task(subject)
    torch.manual_seed(0)
    model = adapted(task.pipe, method, args)
    size = {"trainable_parameters": trainable_parameters(model), "peak_memory_mib": peak_memory(task, model, args)}
    return Training(description(subject, method, 0, COST, args, settings) | size, steps(task, model, args))
