"""One training of the text benchmark: the same data order, λ and masks for every method of a seed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from nara_diffusion.dllm.loss import mask_token_of, masked_cross_entropy
from nara_diffusion.dllm.masking import MaskedBatch, mask_answers
from nara_diffusion.training.adapters.adalora import adalora_models, allocate_ranks, orthogonality
from nara_diffusion.training.optimization import CORE_MARK, hold_core
from quality.step_cost import Step
from quality.text.data import Rows
from quality.text.recipe import Recipe


@dataclass(frozen=True)
class Trained:
    """Attributes: `step_ms`, the median step's time; the `losses`, one a step."""

    step_ms: float
    losses: list[float]


def batches(rows: Rows, recipe: Recipe, seed: int, mask_token_id: int) -> Iterator[MaskedBatch]:
    """The masked batches of a training. They follow from `seed` and the recipe's sizes alone."""
    questions = recipe.batch_size // (2 if recipe.complementary else 1)
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-recipe.steps * questions // len(rows))
    order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(epochs)])
    for step in range(recipe.steps):
        indices = range(step * questions, (step + 1) * questions)
        yield mask_answers(
            **rows.batch(order[indices.start : indices.stop]),
            mask_token_id=mask_token_id,
            seed=seed,
            sample_indices=indices,
            complementary=recipe.complementary,
        )


def train(model: Any, rows: Rows, recipe: Recipe, seed: int, watch: Callable[[int], None] | None = None) -> Trained:
    """Trains what in `model` has requires_grad, in place.

    Args:
        watch: called with the number of each step, from 1, when its gradients are there.

    Raises:
        ArithmeticError: the loss is no longer finite.
    """
    model.train()
    done = list(steps(model, rows, recipe, seed, watch))
    model.eval()
    return Trained(1000 * statistics.median(step.seconds for step in done), [step.loss for step in done])


def steps(
    model: Any, rows: Rows, recipe: Recipe, seed: int, watch: Callable[[int], None] | None = None
) -> Iterator[Step]:
    """The training itself, a step each time that one is asked for; see `train`."""
    optimizer, parameters = build_optimizer(model, recipe)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(recipe.warmup * recipe.steps), recipe.steps)
    adaptive = adalora_models(model)
    for step, batch in enumerate(batches(rows, recipe, seed, mask_token_of(model))):
        began = time.perf_counter()
        loss = objective(model, batch, told(batch, recipe))
        value = loss.item()  # without AdaLoRA's penalty
        if not loss.isfinite():
            raise ArithmeticError(f"the loss became {value} in step {step + 1} of {recipe.steps}")
        (loss + orthogonality(adaptive)).backward()
        if watch is not None:
            watch(step + 1)
        if step < recipe.core_start_step:
            hold_core(optimizer)
        nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
        optimizer.step()
        allocate_ranks(adaptive, step + 1)
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        yield Step(value, time.perf_counter() - began)


def told(batch: MaskedBatch, recipe: Recipe) -> torch.Tensor:
    """The λ (b,) that a model is told of a batch, in training and in validation."""
    return batch.noise_level if recipe.told == "sampled" else batch.masked.sum(1) / batch.answer.sum(1)


def objective(model: nn.Module, batch: MaskedBatch, noise_level: torch.Tensor) -> torch.Tensor:
    """LLaDA's loss, weighted by the λ of the masks, of a model that is told `noise_level` (b,)."""
    token_loss = masked_cross_entropy(model, replace(batch, noise_level=noise_level), logits="all")  # (b, l)
    return (token_loss.sum(1) / batch.noise_level / batch.answer.sum(1)).mean()


def build_optimizer(model: nn.Module, recipe: Recipe) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
    """AdamW with a rate for the core and one for all else, and what it trains."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {
            "name": "adapter",
            "params": [p for name, p in trainable if CORE_MARK not in name],
            "lr": recipe.learning_rate,
        },
        {"name": "core", "params": [p for name, p in trainable if CORE_MARK in name], "lr": recipe.core_learning_rate},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay, fused=True)
    return optimizer, [p for _, p in trainable]
