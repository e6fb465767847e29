"""One run of the text benchmark: backbone × domain × method × seed → its records."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nara_diffusion.dllm import load_backbone
from nara_diffusion.dllm.models.backbone import Backbone
from quality.assets import ASSETS
from quality.running import Job, Settings, Suite, is_noise_aware
from quality.text.answers import answered_right
from quality.text.controls import EVALUATED, check_control, while_evaluating, while_training
from quality.text.data import EncodedDomain, encode_domain
from quality.text.domains import DEFAULT_SIZES, DOMAINS, Sizes, build_domain, sizes_of
from quality.text.methods import BASE, adapted, adapter_arguments
from quality.text.recipe import Recipe
from quality.text.training import train
from quality.text.validation import CENTRES, ValidationSet, binned_loss, validation_set


def text_records(
    backbone: str,
    domain: str,
    method: str,
    seed: int,
    *,
    control: str | None = None,
    sizes: Sizes | Mapping[str, int] = DEFAULT_SIZES,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Trains once, and measures: as it is, and under each control that needs no training of its own.

    Args:
        backbone: a folder of examples/assets, "llada-tiny", or any path that `load_backbone` takes.
        domain: of `DOMAINS`, or one family of questions alone.
        method: a value of the train scripts' --adapter, or "base", the backbone as it is.
        seed: of initialisation, data order, λ and masks.
        control: None, "constant" or "shuffled": the λ that training sees.
        sizes: questions of the domain's parts.
        **settings: fields of `Recipe`, or arguments of the adapter as train_scripts/dllm.py has them.

    Raises:
        ValueError: an unknown name, or a setting that can't be.
        ArithmeticError: training diverged.
    """
    recipe = Recipe.of(**settings)
    check_control(method, control)
    if method != BASE:
        adapter_arguments(method, recipe)  # refuses what is wrong before anything is loaded
    started = time.perf_counter()
    task = load_task(backbone, domain, sizes_of(sizes))
    torch.manual_seed(seed)
    model = adapted(copy.deepcopy(task.model), method, recipe)
    losses: list[float] = []
    if method != BASE:
        with while_training(model, control, seed):
            losses = train(model, task.data.train, recipe, seed)
    common = description(backbone, domain, method, seed, recipe)
    last = losses[-max(1, recipe.steps // 10) :]
    common["trainable_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    common["train_loss"] = round(sum(last) / len(last), 6) if last else None
    evaluated = EVALUATED if is_noise_aware(method) and control is None else ()
    records = []
    for name in (control, *evaluated):
        figures = _measure(model, task, name)
        seconds = round(time.perf_counter() - started, 2)  # with the records before it
        records.append({**common, "control": name, **figures, "seconds": seconds})
    return records


@dataclass(frozen=True)
class Task:
    """What all runs of a backbone and a domain share."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: EncodedDomain
    validation: ValidationSet


@cache
def load_task(backbone: str, domain: str, sizes: Sizes = DEFAULT_SIZES) -> Task:
    """Loads and encodes once a process."""
    model, tokenizer = _backbone(backbone)
    data = encode_domain(build_domain(domain, sizes), tokenizer)
    mask = Backbone(model).mask_token_id()
    return Task(model, tokenizer, data, validation_set(data.validation, mask))


@cache
def _backbone(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder = ASSETS / name
    return load_backbone(str(folder if folder.exists() else name))


def description(backbone: str, domain: str, method: str, seed: int, recipe: Recipe) -> dict[str, Any]:
    """What a record says of a run before it began."""
    is_trained = method != BASE
    return {
        "suite": "text",
        "stage": "main",
        "backbone": backbone,
        "domain": domain,
        "method": method,
        "seed": seed,
        "learning_rate": recipe.learning_rate if is_trained else None,
        "core_learning_rate": recipe.core_learning_rate if method.startswith("nara") else None,
        "rank": recipe.rank if method not in (BASE, "full", "prompt_tuning", "p_tuning") else None,
        "steps": recipe.steps if is_trained else 0,
        "settings": recipe.settings() if is_trained else {},
    }


def _measure(model: nn.Module, task: Task, control: str | None) -> dict[str, Any]:
    """Loss in each bin, and the share of right answers, of a model under an evaluation's control."""
    with while_evaluating(model, control):
        loss = binned_loss(model, task.validation)
        right = answered_right(model, task.tokenizer, task.data.test)
    return {
        "noise_levels": CENTRES,
        "losses": [round(value, 6) for value in loss.losses],
        "loss_errors": [round(value, 6) for value in loss.errors],
        "validation_loss": round(loss.mean, 6),
        "validation_error": round(loss.mean_error, 6),
        "exact_match": right,
        "n": len(task.data.validation),
        "n_exact_match": len(task.data.test),
    }


def run(job: Job, settings: Settings) -> list[dict[str, Any]]:
    """The records of `job`."""
    return text_records(job.backbone, job.domain, job.method, job.seed, control=job.control, **settings)


SUITE = Suite("text", ("llada-tiny", "dream-tiny"), tuple(DOMAINS), run)
