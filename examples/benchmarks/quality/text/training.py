"""One training of the text benchmark: the same data order, λ and masks for every method of a seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from nara_diffusion.dllm.loss import masked_cross_entropy
from nara_diffusion.dllm.masking import MaskedBatch, mask_answers
from nara_diffusion.dllm.models.backbone import Backbone
from nara_diffusion.training.optimization import is_core_parameter
from quality.text.data import Rows
from quality.text.recipe import Recipe


def batches(rows: Rows, recipe: Recipe, seed: int, mask_token_id: int) -> Iterator[MaskedBatch]:
    """The masked batches of a training. They follow from `seed` and the recipe's sizes alone."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-recipe.steps * recipe.batch_size // len(rows))
    order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(epochs)])
    for step in range(recipe.steps):
        indices = range(step * recipe.batch_size, (step + 1) * recipe.batch_size)
        yield mask_answers(
            **rows.batch(order[indices.start : indices.stop]),
            mask_token_id=mask_token_id,
            seed=seed,
            sample_indices=indices,
        )


def train(model: Any, rows: Rows, recipe: Recipe, seed: int, watch: Callable[[int], None] | None = None) -> list[float]:
    """Trains what in `model` has requires_grad, in place; returns the loss of each step.

    Args:
        watch: called with the number of each step, from 1, when its gradients are there.

    Raises:
        ArithmeticError: the loss is no longer finite.
    """
    model.train()
    optimizer, parameters = build_optimizer(model, recipe)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(recipe.warmup * recipe.steps), recipe.steps)
    losses = []
    for step, batch in enumerate(batches(rows, recipe, seed, Backbone(model).mask_token_id()), start=1):
        loss = objective(model, batch)
        losses.append(loss.item())
        if not loss.isfinite():
            raise ArithmeticError(f"the loss became {losses[-1]} in step {step} of {recipe.steps}")
        loss.backward()
        if watch is not None:
            watch(step)
        nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    model.eval()
    return losses


def objective(model: nn.Module, batch: MaskedBatch) -> torch.Tensor:
    """LLaDA's loss, weighted by λ."""
    token_loss = masked_cross_entropy(model, batch, logits="all")  # (b, l)
    return (token_loss.sum(1) / batch.noise_level / batch.answer.sum(1)).mean()


def build_optimizer(model: nn.Module, recipe: Recipe) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
    """AdamW with a rate for the core and one for all else, and what it trains."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {
            "name": "adapter",
            "params": [p for name, p in trainable if not is_core_parameter(name)],
            "lr": recipe.learning_rate,
        },
        {
            "name": "core",
            "params": [p for name, p in trainable if is_core_parameter(name)],
            "lr": recipe.core_learning_rate,
        },
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay, fused=True)
    return optimizer, [p for _, p in trainable]
