"""One run of the text benchmark: backbone, domain, method, seed → its records, by train_scripts/dllm.py's arguments."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nara_diffusion.dllm import Generation, generate, load_backbone
from nara_diffusion.dllm.loss import masked_cross_entropy
from nara_diffusion.dllm.masking import MaskedBatch, mask_answers
from nara_diffusion.dllm.models.backbone import Backbone
from nara_diffusion.dllm.tokenizer import decode_answer, stop_token_ids
from nara_diffusion.training.adapters import build_adapter
from nara_flags.options import option
from nara_flags.training import AdapterArguments, OptimizationArguments
from quality.running import ASSETS, BASE, RANK, Job, Settings, Suite, arguments_of, optimize, records_of
from quality.text.data import EncodedDomain, Rows, encode_domain
from quality.text.domains import DEFAULT_SIZES, DOMAINS, Sizes, build_domain, is_right, sizes_of
from quality.text.validation import CENTRES, ValidationSet, binned_losses, validation_set
from quality.wrong_noise import changed_noise, training_change

# ---------------------------------------------------------------------- training

DEFAULTS: dict[str, Any] = {
    "rank": RANK,
    "target_modules": ["all-linear"],
    "train_batch_size": 8,
    "max_train_steps": 500,
    "learning_rate": 5e-3,
    "core_learning_rate": 1e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 0.05,
}


@dataclass
class TextArguments(AdapterArguments, OptimizationArguments):
    """Those of train_scripts/dllm.py that a run has."""

    seed: int = option(0, "Of weights and data.")


def text_arguments(method: str, seed: int, settings: Settings) -> TextArguments:
    """Those of one training."""
    return arguments_of(TextArguments, {**settings, **({} if method == BASE else {"adapter": method}), "seed": seed})


def adapted(name: str, method: str, args: TextArguments, **options: Any) -> Any:
    """A copy of a language model with what `method` trains, which requires a gradient; of "base" nothing does.

    Raises:
        ValueError: unknown method or argument.
    """
    model = copy.deepcopy(load(name)[0])
    return model.requires_grad_(False) if method == BASE else build_adapter(model, args, **options)


@cache
def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A folder of examples/assets, or what `load_backbone` takes; never changed."""
    return load_backbone(str(ASSETS / name if (ASSETS / name).exists() else name))


def batches(rows: Rows, args: TextArguments, mask_token_id: int) -> Iterator[MaskedBatch]:
    """The masked batches of a training. They follow from its seed and sizes alone."""
    generator, steps, size = torch.Generator().manual_seed(args.seed), args.max_train_steps or 0, args.train_batch_size
    order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(-(-steps * size // len(rows)))])
    for first in range(0, steps * size, size):
        options = {"mask_token_id": mask_token_id, "seed": args.seed, "sample_indices": range(first, first + size)}
        yield mask_answers(**rows.batch(order[first : first + size]), **options)


def loss_of(model: nn.Module, rows: Rows, args: TextArguments) -> Callable[[int], Tensor]:
    """LLaDA's loss, weighted by λ, of the next batch."""
    masked = batches(rows, args, Backbone(model).mask_token_id())

    def loss(_: int) -> Tensor:
        batch = next(masked)
        token_loss = masked_cross_entropy(model, batch, chunk_size=None)  # (b, l)
        return (token_loss.sum(1) / batch.noise_level / batch.answer.sum(1)).mean()

    return loss


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


@dataclass(frozen=True)
class Task:
    """What all runs of a backbone and a domain share."""

    tokenizer: PreTrainedTokenizerBase
    data: EncodedDomain
    validation: ValidationSet


@cache
def load_task(backbone: str, domain: str, sizes: Sizes = DEFAULT_SIZES) -> Task:
    """Loads and encodes once a process."""
    model, tokenizer = load(backbone)
    data = encode_domain(build_domain(domain, sizes), tokenizer)
    return Task(tokenizer, data, validation_set(data.validation, Backbone(model).mask_token_id()))


def _measure(model: nn.Module, task: Task) -> dict[str, Any]:
    """Loss in each bin, and the share of right answers."""
    losses = binned_losses(model, task.validation)
    return {
        "noise_levels": CENTRES,
        "losses": [round(value, 6) for value in losses],
        "validation_loss": round(sum(losses) / len(losses), 6),
        "exact_match": answered_right(model, task.tokenizer, task.data.test),
        "n": len(task.data.validation),
        "n_exact_match": len(task.data.test),
    }


def run(job: Job, settings: Settings) -> list[dict[str, Any]]:
    """The records of `job`; `settings` are arguments, and "sizes" of the domain's parts."""
    started = time.perf_counter()
    values = DEFAULTS | dict(settings)
    task = load_task(job.backbone, job.domain, sizes_of(values.pop("sizes", DEFAULT_SIZES)))
    args = text_arguments(job.method, job.seed, values)
    torch.manual_seed(job.seed)
    model = adapted(job.backbone, job.method, args)
    if job.method != BASE:
        change = training_change(job.control, job.seed)
        with nullcontext() if change is None else changed_noise(model, change):
            optimize(model, loss_of(model, task.data.train, args), args)
    return records_of(job, args, values, model, partial(_measure, model, task), started, torch.tensor(CENTRES))


SUITE = Suite("text", ("llada-tiny", "dream-tiny"), tuple(DOMAINS), run)
