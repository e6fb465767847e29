"""Exact match: the share of right answers among those that a masked language model generates.

A rule extracts the answer from a generated text and compares it with the right answer. The tasks of
`nara-eval` use the same rules:

    text     the whole text, with each run of white space as one space
    number   the last number, ignoring commas; right if within 0.001 of the right number
    letter   the last of A … E that is a separate word
    choice   the first of answer1 … answer5, ending1 … ending4, option1, option2, solution1,
             solution2, true, false that is of the same kind as the right answer; if the right
             answer contains none of these, the rule "letter" applies

The last three rules are from LLM-Adapters (arXiv 2304.01933), but the scripts of that project match
parts of words: they find "A" in "Answer" and "true" in "untrue". They don't find "True", which the
rules here do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .sampler import answer_prompts
from .tokenizer import decode_answer, stop_token_ids

TOLERANCE = 1e-3
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_LETTER = re.compile(r"\b[A-E]\b")
_CHOICE = re.compile(
    r"\b(?:answer[1-5]|ending[1-4]|option[12]|solution[12]|true|false)\b", re.IGNORECASE
)


@dataclass(frozen=True)
class ExactMatch:
    """The result of `exact_match`.

    Attributes:
        score: the share of right answers, in [0, 1].
        correct, total: the numbers of right answers and of all answers.
        generations: one {instruction, generation, extracted, answer, correct} for each row, in the
            order of the rows.
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

    A generation is the text before the first end token. It is right if `extract` finds the same
    answer in the generation and in the row's `answer`.

    Args:
        model: the outermost module.
        rows: rows from `encode_records`, with `input_ids`, `prompt_length`, `instruction` and
            `answer`.
        extract: the name of a rule ("text", "number", "letter" or "choice"), or a function from
            text to text.
        **sampling: arguments of `generate`, such as gen_length.

    Raises:
        ValueError: `extract` is not a known rule.
    """
    ends = stop_token_ids(model, tokenizer)
    sampling = {"chat": bool(tokenizer.chat_template), "eos_token_id": ends, **sampling}
    by_length = sorted(range(len(rows)), key=lambda i: rows[i]["prompt_length"])
    generations: list[dict[str, Any]] = [{}] * len(rows)
    forwards = 0
    with tqdm(total=len(rows), desc="generate", unit="row", disable=not progress) as bar:
        for start in range(0, len(rows), batch_size):
            indices = by_length[start : start + batch_size]
            batch = [rows[i] for i in indices]
            prompts = [row["input_ids"][: row["prompt_length"]] for row in batch]
            result = answer_prompts(model, prompts, **sampling)
            forwards += result.forwards
            for i, row, answer in zip(indices, batch, result.answers.tolist(), strict=True):
                text = decode_answer(tokenizer, answer, ends)
                named, is_right = compare(extract, text, row["answer"])
                generations[i] = {
                    "instruction": row["instruction"],
                    "generation": text,
                    "extracted": named,
                    "answer": row["answer"],
                    "correct": is_right,
                }
            bar.update(len(indices))
    correct = sum(generation["correct"] for generation in generations)
    return ExactMatch(correct / len(rows), correct, len(rows), generations, forwards)


def compare(extract: str | Callable[[str], str], text: str, answer: str) -> tuple[str, bool]:
    """Extract the answer from a generated `text`, and compare it with the right `answer`.

    If `extract` is a function, the answer is right if both texts give the same result.

    Returns:
        The extracted answer, "" if there is none, and whether it is right.

    Raises:
        ValueError: `extract` is not a known rule.
    """
    if extract == "number":
        return _compare_numbers(text, answer)
    choice = _CHOICE.search(answer) if extract == "choice" else None
    if choice is not None:
        right = choice[0].lower()
        choices = map(str.lower, _CHOICE.findall(text))
        named = next((choice for choice in choices if _kind(choice) == _kind(right)), "")
    elif extract in ("letter", "choice"):
        named, right = _last_letter(text), _last_letter(answer)
    elif extract == "text":
        named, right = " ".join(text.split()), " ".join(answer.split())
    elif callable(extract):
        named, right = extract(text), extract(answer)
    else:
        raise ValueError(
            f"extract is {extract!r}, expected 'text', 'number', 'letter', 'choice', or a function"
        )
    return named, named == right and right != ""


def _compare_numbers(text: str, answer: str) -> tuple[str, bool]:
    named = _NUMBER.findall(text.replace(",", ""))
    right = _NUMBER.findall(answer.replace(",", ""))
    if not named:
        return "", False
    number = float(named[-1])
    is_right = bool(right) and abs(number - float(right[-1])) <= TOLERANCE
    return format(number, ".15g"), is_right


def _kind(choice: str) -> str:
    """Return the kind of a choice: "answer" for "answer1", "truth" for "true" and "false"."""
    return "truth" if choice in ("true", "false") else choice[:-1]


def _last_letter(text: str) -> str:
    letters = _LETTER.findall(text)
    return letters[-1] if letters else ""
