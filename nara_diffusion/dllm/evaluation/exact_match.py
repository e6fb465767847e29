"""Two measures of a masked language model: its loss at each noise level, and the share of right answers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from nara_diffusion.dllm.data.collator import AnswerCollator
from nara_diffusion.dllm.data.encoding import end_token_id
from nara_diffusion.dllm.loss import mask_token_of, masked_cross_entropy
from nara_diffusion.dllm.masking import mask_answers
from nara_diffusion.dllm.models.lm_head import configured
from nara_diffusion.dllm.sampler import Generation, generate
from nara_diffusion.utils.eval_mode import evaluating, without_ddp

from .answers import Rule, rule_of

logger = logging.getLogger(__name__)


@torch.no_grad()
def noise_level_curve(
    model: nn.Module,
    rows: Sequence[Mapping[str, Any]],
    noise_levels: Sequence[float],
    *,
    collator: AnswerCollator | None = None,
    batch_size: int = 16,
    repeats: int = 1,
    seed: int = 0,
    mask_token_id: int | None = None,
    progress: bool = True,
) -> list[float]:
    """The validation loss at each noise level, in nats a masked token.

    The training objective at fixed λ, with its expected number of masked tokens λ·n replaced by the actual one:

        loss(λ) = Σ_i (1/n_i) Σ_{j masked} − log p(x_ij)  /  Σ_i (1/n_i) Σ_{j masked} 1

    over all rows i with answers of n_i tokens. That ratio, and masks that depend on (seed, row, λ) alone and grow
    with λ, keep the variance low: two models, or two λ, are compared on the same masks.

    Args:
        model: the outermost module.
        rows: of `encode_records`.
        noise_levels: λ in (0, 1].
        collator: how rows become a batch; padding that is trained on counts. Default: each answer and its end alone.
        repeats: sets of masks to average over.

    Returns:
        One loss a noise level; NaN where no token got masked.

    Raises:
        ValueError: no rows, or a noise level outside (0, 1].
    """
    _check_rows(rows, batch_size)
    mask = mask_token_of(model, mask_token_id)
    model = without_ddp(model)
    collate = collator or AnswerCollator(configured(model, "pad_token_id") or 0, trained_padding=0)
    starts = range(0, len(rows), batch_size)
    losses = []
    bar = tqdm(total=len(noise_levels) * repeats * len(starts), desc="loss over λ", unit="batch", disable=not progress)
    with evaluating(model), bar:
        for level in noise_levels:
            total = count = 0.0
            for repeat in range(repeats):
                for start in starts:
                    indices = range(start, min(start + batch_size, len(rows)))
                    batch = mask_answers(
                        **_on_device(collate([rows[i] for i in indices]), model),
                        mask_token_id=mask,
                        noise_level=level,
                        seed=seed,
                        sample_indices=[repeat * len(rows) + i for i in indices],
                    )
                    lengths = batch.answer.sum(1)
                    total += (masked_cross_entropy(model, batch).double().sum(1) / lengths).sum().item()
                    count += (batch.masked.double().sum(1) / lengths).sum().item()
                    bar.update()
            losses.append(total / count if count else float("nan"))
    return losses


@dataclass(frozen=True)
class ExactMatch:
    """Attributes:
    score: share of right answers, in [0, 1].
    correct, total: their numbers.
    generations: one {instruction, generation, extracted, answer, correct} a row, in the rows' order.
    forwards: the number of forwards of the model.
    """

    score: float
    correct: int
    total: int
    generations: list[dict[str, Any]]
    forwards: int


def exact_match(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    *,
    gen_length: int,
    batch_size: int = 16,
    extract: str | Callable[[str], str] = "text",
    progress: bool = True,
    **sampling: Any,
) -> ExactMatch:
    """Generate an answer to the prompt of each row, and count the right ones.

    A generation is the text before its first end token. What `extract` finds in it has to be what it finds in the
    row's `answer`, by the rules of `nara_diffusion.dllm.evaluation.answers`, which are nara-eval's too:

        "text"     the text, with runs of white space as one space
        "number"   the last number in it, within 0.001 ("1,000.0" equals "1000")
        "choice"   the first of answer1 …, ending1 …, option1 …, solution1 …, true, false that is of the right one's
                   kind; where the right one is a letter, the last of A … E that stands alone
        a function of one's own, from text to text

    Args:
        model: the outermost module.
        rows: of `encode_records`: `input_ids`, `prompt_length`, `answer`.
        gen_length: tokens of an answer, at most.
        **sampling: further arguments of `generate`.

    Raises:
        ValueError: no rows, or an unknown `extract`.
    """
    _check_rows(rows, batch_size)
    rule = rule_of(extract, (row["answer"] for row in rows))
    _warn_of_nameless(rows, rule, extract)
    ends = stop_token_ids(model, tokenizer)
    by_length = sorted(range(len(rows)), key=lambda i: rows[i]["prompt_length"])
    texts: dict[int, str] = {}
    forwards = 0
    with tqdm(total=len(rows), desc="generate", unit="row", disable=not progress) as bar:
        for start in range(0, len(rows), batch_size):
            indices = by_length[start : start + batch_size]
            result = _answer(model, [rows[i] for i in indices], gen_length, {"eos_token_id": ends, **sampling})
            forwards += result.forwards
            for i, answer in zip(indices, result.answers.tolist(), strict=True):
                texts[i] = decode_answer(tokenizer, answer, ends)
            bar.update(len(indices))
    generations = [_judged(rows[i], texts[i], rule) for i in range(len(rows))]
    correct = sum(generation["correct"] for generation in generations)
    return ExactMatch(correct / len(rows), correct, len(rows), generations, forwards)


def stop_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: those of the model, of the tokenizer, and the end of a turn if there is one."""
    config_ids = configured(model, "eos_token_id")
    ids = [*(config_ids if isinstance(config_ids, list) else [config_ids]), end_token_id(tokenizer)]
    vocabulary = tokenizer.get_vocab()
    ids += [vocabulary.get(turn_end) for turn_end in ("<|eot_id|>", "<|im_end|>")]
    return sorted({token for token in ids if token is not None})


def decode_answer(tokenizer: PreTrainedTokenizerBase, answer: Sequence[int], ends: Sequence[int]) -> str:
    """The text before the first end token."""
    length = next((j for j, token in enumerate(answer) if token in ends), len(answer))
    text = tokenizer.decode(list(answer[:length]), skip_special_tokens=True)
    assert isinstance(text, str)
    return text.strip()


def _judged(row: Mapping[str, Any], text: str, rule: Rule) -> dict[str, Any]:
    found = rule(text, row["answer"])
    return {
        "instruction": row["instruction"],
        "generation": text,
        "extracted": found.named,
        "answer": row["answer"],
        "correct": found.is_right,
    }


def _warn_of_nameless(rows: Sequence[Mapping[str, Any]], rule: Rule, extract: str | Callable[[str], str]) -> None:
    """Warn of rows whose right answer names nothing, so that no generation is right."""
    nameless = [row["answer"] for row in rows if not rule(row["answer"], row["answer"]).is_right]
    if nameless:
        logger.warning(
            "%d of %d right answers name nothing by the rule %r, the first of them %r: nothing that is generated will "
            "count as right there; choose another `extract`",
            *(len(nameless), len(rows), extract, nameless[0]),
        )


def _answer(
    model: nn.Module, rows: Sequence[Mapping[str, Any]], gen_length: int, sampling: dict[str, Any]
) -> Generation:
    lengths = [row["prompt_length"] for row in rows]
    prompts = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        prompts[i, :length] = torch.as_tensor(row["input_ids"][:length])
    result = generate(
        model,
        prompts.to(_device(model)),
        prompt_lengths=lengths,
        gen_length=gen_length,
        return_stats=True,
        **sampling,
    )
    assert isinstance(result, Generation)
    return result


def _check_rows(rows: Sequence[Mapping[str, Any]], batch_size: int) -> None:
    if len(rows) == 0:
        raise ValueError("there are no rows to evaluate on")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected 1 at least")


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _on_device(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Move a batch to the device of `model`, without `sample_indices`, which are counted otherwise here."""
    return {name: tensor.to(_device(model)) for name, tensor in batch.items() if name != "sample_indices"}
