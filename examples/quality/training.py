"""One training: the same data order, λ and masks for every method of a seed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from nara_diffusion.dllm.loss import mask_token_of, masked_cross_entropy
from nara_diffusion.dllm.masking import MaskedBatch, mask_answers
from nara_diffusion.training.optimization import CORE_MARK
from quality.recipe import Recipe
from quality.text_data import Rows

CONSTANT = 0.5


@dataclass(frozen=True)
class Trained:
    """Attributes: `step_ms` is the median step's time; `seconds` the whole training's; `losses` one a step."""

    step_ms: float
    seconds: float
    losses: list[float]


def batches(rows: Rows, recipe: Recipe, seed: int, mask_token_id: int) -> Iterator[MaskedBatch]:
    """The masked batches of a training. They follow from `seed` and the recipe's sizes alone."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(_epochs(rows, recipe))])
    b = recipe.batch_size
    for step in range(recipe.steps):
        yield mask_answers(
            **rows.batch(order[step * b : (step + 1) * b]),
            mask_token_id=mask_token_id,
            seed=seed,
            sample_indices=range(step * b, (step + 1) * b),
            complementary=recipe.complementary,
        )


def _epochs(rows: Rows, recipe: Recipe) -> int:
    return -(-recipe.steps * recipe.batch_size // len(rows))


def told_level(batch: MaskedBatch, recipe: Recipe, step: int) -> torch.Tensor:
    """The λ (b,) that the model is told in training, which may not be the one by which tokens were masked."""
    level = batch.noise_level if recipe.told == "sampled" else masked_share(batch)
    if recipe.control == "constant":
        return torch.full_like(level, CONSTANT)
    if recipe.control == "shuffled":
        return level[torch.randperm(len(level), generator=torch.Generator().manual_seed(step))]
    return level


def masked_share(batch: MaskedBatch) -> torch.Tensor:
    """The share (b,) of each answer that is masked."""
    return batch.masked.sum(1) / batch.answer.sum(1)


def train(model: nn.Module, rows: Rows, recipe: Recipe, seed: int) -> Trained:
    """Trains what in `model` has requires_grad, in place."""
    optimizer, parameters = _optimizer(model, recipe)
    warmup = round(recipe.warmup * recipe.steps)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, recipe.steps)
    times, losses, started = [], [], time.perf_counter()
    model.train()
    for step, batch in enumerate(batches(rows, recipe, seed, mask_token_of(model))):
        began = time.perf_counter()
        told = replace(batch, noise_level=told_level(batch, recipe, step))
        token_loss = masked_cross_entropy(model, told, logits="all")  # (b, l)
        loss = (token_loss.sum(1) / batch.noise_level / batch.answer.sum(1)).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(loss.item())
        times.append(time.perf_counter() - began)
    model.eval()
    return Trained(1000 * statistics.median(times), time.perf_counter() - started, losses)


def _optimizer(model: nn.Module, recipe: Recipe) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    core = [p for name, p in trainable if CORE_MARK in name]
    other = [p for name, p in trainable if CORE_MARK not in name]
    groups = [{"params": other, "lr": recipe.learning_rate}, {"params": core, "lr": recipe.core_learning_rate}]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], weight_decay=recipe.weight_decay, fused=True
    )
    return optimizer, [*other, *core]
