"""What a step of a method costs beside one of LoRA, on the text benchmark."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from quality.jobs import COST
from quality.step_cost import BASELINE, Training, cost_record
from quality.text.methods import adapted
from quality.text.recipe import Recipe
from quality.text.runs import description, load_task, size
from quality.text.training import steps


def text_cost(
    backbone: str, domain: str, method: str, settings: Mapping[str, Any], shared: Mapping[str, Any]
) -> dict[str, Any]:
    """The record of `method`.

    Args:
        settings: as `text_records` takes them.
        shared: those of them that LoRA has as well.
    """
    own = _training(backbone, domain, method, Recipe.of(**settings))
    return cost_record(own, _training(backbone, domain, BASELINE, Recipe.of(**shared)))


def _training(backbone: str, domain: str, method: str, recipe: Recipe) -> Training:
    task = load_task(backbone, domain)
    torch.manual_seed(0)
    model = adapted(copy.deepcopy(task.model), method, recipe)
    record = description(backbone, domain, method, 0, COST, recipe) | size(model, task, recipe)
    return Training(record, steps(model.train(), task.data.train, recipe, 0))
