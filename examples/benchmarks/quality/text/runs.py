"""One run of the text benchmark: backbone × domain × method × seed → its records."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_cosine_schedule_with_warmup

from nara_diffusion.dllm import Generation, generate, load_backbone
from nara_diffusion.dllm.exact_match import decode_answer, stop_token_ids
from nara_diffusion.dllm.loss import masked_cross_entropy
from nara_diffusion.dllm.masking import MaskedBatch, mask_answers
from nara_diffusion.dllm.models.backbone import Backbone
from nara_diffusion.training.optimization import is_core_parameter
from quality.assets import ASSETS
from quality.running import Job, Settings, Suite, is_noise_aware
from quality.text.data import EncodedDomain, Rows, encode_domain
from quality.text.domains import DEFAULT_SIZES, DOMAINS, Sizes, build_domain, is_right, sizes_of
from quality.text.recipe import BASE, Recipe, adapted
from quality.text.validation import CENTRES, ValidationSet, binned_losses, validation_set
from quality.wrong_noise import EVALUATED, changed_noise, constant_noise, exchanged_noise, while_evaluating

# ---------------------------------------------------------------------- training


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
    token_loss = masked_cross_entropy(model, batch, chunk_size=None)  # (b, l)
    return (token_loss.sum(1) / batch.noise_level / batch.answer.sum(1)).mean()


def build_optimizer(model: nn.Module, recipe: Recipe) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
    """AdamW with a rate for the core and one for all else, and what it trains."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    core = [p for name, p in trainable if is_core_parameter(name)]
    factors = [p for name, p in trainable if not is_core_parameter(name)]
    groups = [{"params": factors, "lr": recipe.learning_rate}, {"params": core, "lr": recipe.core_learning_rate}]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay, fused=True)
    return optimizer, [p for _, p in trainable]


# ---------------------------------------------------------------------- answers

BATCH = 256  # questions
TOKENS_A_STEP = 2


def answered_right(model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> float:
    """The share of `rows` whose greedily generated answer its verifier accepts, in [0, 1]."""
    ends = stop_token_ids(model, tokenizer)
    right = 0
    for chosen in rows.prompt_lengths.argsort(stable=True).split(BATCH):
        lengths = rows.prompt_lengths[chosen]
        result = generate(
            model,
            rows.input_ids[chosen, : int(lengths.max())],
            prompt_lengths=lengths,
            gen_length=rows.answer_length,
            steps=-(-rows.answer_length // TOKENS_A_STEP),
            eos_token_id=ends,
            return_stats=True,
        )
        assert isinstance(result, Generation)
        for index, answer in zip(chosen.tolist(), result.answers.tolist(), strict=True):
            right += is_right(rows.questions[index], decode_answer(tokenizer, answer, ends))
    return right / len(rows)


# ---------------------------------------------------------------------- runs


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
    started = time.perf_counter()
    task = load_task(backbone, domain, sizes_of(sizes))
    torch.manual_seed(seed)
    model = adapted(copy.deepcopy(task.model), method, recipe)
    losses: list[float] = []
    if method != BASE:
        exchange = exchanged_noise(torch.Generator().manual_seed(seed))
        changes = {"constant": constant_noise, "shuffled": exchange}
        with nullcontext() if control is None else changed_noise(model, changes[control]):
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
    with while_evaluating(model, control, torch.tensor(CENTRES)):
        losses = binned_losses(model, task.validation)
        right = answered_right(model, task.tokenizer, task.data.test)
    return {
        "noise_levels": CENTRES,
        "losses": [round(value, 6) for value in losses],
        "validation_loss": round(sum(losses) / len(losses), 6),
        "exact_match": right,
        "n": len(task.data.validation),
        "n_exact_match": len(task.data.test),
    }


def run(job: Job, settings: Settings) -> list[dict[str, Any]]:
    """The records of `job`."""
    return text_records(job.backbone, job.domain, job.method, job.seed, control=job.control, **settings)


SUITE = Suite("text", ("llada-tiny", "dream-tiny"), tuple(DOMAINS), run)
