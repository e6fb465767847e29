"""The share of right answers among those that a masked language model generates.

Rules find the answer in a generated text and compare it, here and in the tasks of `nara-eval`:

    text     the whole text, with runs of white space as one space
    number   the last number, commas left out, equal to the right answer's last within 0.001
    letter   the last of A … E that stands alone
    choice   the first of answer1 … answer5, ending1 … ending4, option1, option2, solution1, solution2, true, false that
             is of the right answer's kind; the rule letter where the right answer names none of them

The last three are those of LLM-Adapters (arXiv 2304.01933). Its own scripts differ where a word contains a choice: "A"
of "Answer" and "true" of "untrue" are named there, and not here; and "True" is named here, and not there.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .encoding import end_token_id
from .models.backbone import Backbone
from .sampler import Generation, generate

logger = logging.getLogger(__name__)

TOLERANCE = 1e-3
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_LETTER = re.compile(r"\b[A-E]\b")
_CHOICE = re.compile(
    r"\b(?:answer[1-5]|ending[1-4]|option[12]|solution[12]|true|false)\b", re.IGNORECASE
)


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
    batch_size: int = 16,
    extract: str | Callable[[str], str] = "text",
    progress: bool = True,
    **sampling: Any,
) -> ExactMatch:
    """Generate an answer to the prompt of each row, and count the right ones.

    A generation is the text before its first end token. What `extract` finds in it has to be what it finds in the
    row's `answer`: "text", "number", "letter" or "choice", the rules above, or a function of
    one's own, from text to text.

    Args:
        model: the outermost module.
        rows: of `encode_records`: `input_ids`, `prompt_length`, `answer`.
        **sampling: arguments of `generate`, gen_length first of all.

    Raises:
        ValueError: an unknown `extract`.
    """
    nameless = [
        row["answer"] for row in rows if not compare(extract, row["answer"], row["answer"])[1]
    ]
    if nameless:
        logger.warning(
            "%d of %d right answers name nothing by the rule %r, the first of them %r: nothing that is generated will "
            "count as right there; choose another `extract`",
            *(len(nameless), len(rows), extract, nameless[0]),
        )
    ends = stop_token_ids(model, tokenizer)
    sampling = {"chat": bool(tokenizer.chat_template), "eos_token_id": ends, **sampling}
    by_length = sorted(range(len(rows)), key=lambda i: rows[i]["prompt_length"])
    generations: list[dict[str, Any]] = [{}] * len(rows)
    forwards = 0
    with tqdm(total=len(rows), desc="generate", unit="row", disable=not progress) as bar:
        for start in range(0, len(rows), batch_size):
            indices = by_length[start : start + batch_size]
            prompts = [rows[i]["input_ids"][: rows[i]["prompt_length"]] for i in indices]
            result = answer_prompts(model, prompts, **sampling)
            forwards += result.forwards
            for i, answer in zip(indices, result.answers.tolist(), strict=True):
                row, text = rows[i], decode_answer(tokenizer, answer, ends)
                named, is_right = compare(extract, text, row["answer"])
                generations[i] = {
                    "instruction": row["instruction"],
                    "generation": text,
                    "extracted": named,
                }
                generations[i] |= {"answer": row["answer"], "correct": is_right}
            bar.update(len(indices))
    correct = sum(generation["correct"] for generation in generations)
    return ExactMatch(correct / len(rows), correct, len(rows), generations, forwards)


def answer_prompts(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    device: torch.device | None = None,
    **sampling: Any,
) -> Generation:
    """`generate` for prompts of unequal length, as lists of token ids, on `device` or that of the parameters."""
    input_ids = pad_sequence(
        [torch.as_tensor(prompt, dtype=torch.long) for prompt in prompts], batch_first=True
    )
    input_ids, lengths = (
        input_ids.to(device or Backbone(model).device),
        [len(prompt) for prompt in prompts],
    )
    result = generate(model, input_ids, prompt_lengths=lengths, return_stats=True, **sampling)
    assert isinstance(result, Generation)
    return result


def stop_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: those of the model, of the tokenizer, and the end of a turn if there is one."""
    config_ids = Backbone(model).configured("eos_token_id")
    ids = [*(config_ids if isinstance(config_ids, list) else [config_ids]), end_token_id(tokenizer)]
    vocabulary = tokenizer.get_vocab()
    ids += [vocabulary.get(turn_end) for turn_end in ("<|eot_id|>", "<|im_end|>")]
    return sorted({token for token in ids if token is not None})


def decode_answer(
    tokenizer: PreTrainedTokenizerBase,
    answer: Sequence[int],
    ends: Sequence[int],
    *,
    strip: bool = True,
) -> str:
    """The text before the first end token; white space around it stays without `strip`, as a program's indentation."""
    length = next((j for j, token in enumerate(answer) if token in ends), len(answer))
    text = str(tokenizer.decode(list(answer[:length]), skip_special_tokens=True))
    return text.strip() if strip else text


def compare(extract: str | Callable[[str], str], text: str, answer: str) -> tuple[str, bool]:
    """The answer that a generated `text` names by the rule `extract`, "" if it names none; and whether that equals the
    right `answer`.

    Args:
        extract: "text", "number", "letter" or "choice"; or a function from text to text, whose values for both texts
            have to be equal.

    Raises:
        ValueError: an unknown name.
    """
    if extract == "number":
        named, right = (
            [float(n) for n in _NUMBER.findall(words.replace(",", ""))][-1:]
            for words in (text, answer)
        )
        is_right = bool(named and right) and abs(named[0] - right[0]) <= TOLERANCE
        return format(named[0], ".15g") if named else "", is_right
    if extract == "choice" and (wanted := _CHOICE.search(answer)):
        kinds = {"true": "truth", "false": "truth"}
        kind = lambda choice: kinds.get(choice, choice[:-1])  # noqa: E731
        right, choices = wanted[0].lower(), [choice.lower() for choice in _CHOICE.findall(text)]
        return _equal(
            next((choice for choice in choices if kind(choice) == kind(right)), ""), right
        )
    if extract in ("letter", "choice"):
        return _equal(*("".join(_LETTER.findall(words)[-1:]) for words in (text, answer)))
    if not callable(extract) and extract != "text":
        raise ValueError(
            f"extract is {extract!r}, expected 'text', 'number', 'letter', 'choice', or a function"
        )
    find = extract if callable(extract) else lambda words: " ".join(words.split())
    return _equal(find(text), find(answer))


def _equal(named: str, right: str) -> tuple[str, bool]:
    return named, named == right and right != ""
