"""Rules that find the answer in a generated text and compare it, for `exact_match` and nara-eval's tasks.

    text     the whole text, with runs of white space as one space
    number   the last number, commas left out, equal to the right answer's last within 0.001
    letter   the last of A … E that stands alone
    choice   the first of answer1 …, ending1 …, option1 …, solution1 …, true, false that is of the right answer's kind

The last three are those of LLM-Adapters (arXiv 2304.01933). Its own scripts differ where a word contains a choice: "A"
of "Answer" and "true" of "untrue" are named there, and not here; and "True" is named here, and not there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple

TOLERANCE = 1e-3
CHOICES = {"answer": 5, "ending": 4, "option": 2, "solution": 2}
"""The number of choices of each kind in the sets of LLM-Adapters."""

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_LETTER = re.compile(r"\b[A-E]\b")
_CHOICE = re.compile(r"\b(?:(answer|ending|option|solution)([1-9]\d*)|(true|false))\b", re.IGNORECASE)


class Found(NamedTuple):
    """Attributes:
    named: the answer that the text names, "" if it names none.
    is_right: whether that equals the right answer.
    """

    named: str
    is_right: bool


Rule = Callable[[str, str], Found]
"""(generated text, right answer) → `Found`."""


def rule_of(extract: str | Callable[[str], str], answers: Iterable[str]) -> Rule:
    """The rule of the name `extract`, for a set with these right answers.

    Args:
        extract: "text", "number", "choice" (which is the rule letter where the right answer names no choice), or a
            function from text to text: its values for the text and for the right answer have to be equal.
        answers: the right answers. The largest number among them, or `CHOICES`, is the number of choices.

    Raises:
        ValueError: an unknown `extract`.
    """
    if callable(extract):
        return partial(by_function, function=extract)
    if extract == "choice":
        return partial(_by_choice_or_letter, counts=_counts(answers))
    if extract not in _RULES:
        known = ", ".join(map(repr, (*_RULES, "choice")))
        raise ValueError(f"extract is {extract!r}, expected one of {known}, or a function")
    return _RULES[extract]


def by_text(text: str, answer: str) -> Found:
    """Compare the texts, with runs of white space as one space."""
    return by_function(text, answer, lambda text: " ".join(text.split()))


def by_function(text: str, answer: str, function: Callable[[str], str]) -> Found:
    """Compare the values of `function` for both texts; an empty value is wrong."""
    return _compared(function(text), function(answer))


def by_number(text: str, answer: str) -> Found:
    """Compare the last number of the text with the answer's last one."""
    named, right = _last_number(text), _last_number(answer)
    is_right = named is not None and right is not None and abs(named - right) <= TOLERANCE
    return Found("" if named is None else format(named, ".15g"), is_right)


def by_letter(text: str, answer: str) -> Found:
    """Compare the last letter A … E of the text with the answer's last one."""
    named, right = (next(iter(_LETTER.findall(words)[-1:]), "") for words in (text, answer))
    return _compared(named, right)


def by_choice(text: str, answer: str, counts: Mapping[str, int] = CHOICES) -> Found:
    """Compare the first choice of the answer's kind in the text with the answer's first one."""
    right = next(iter(_choices(answer, counts)), "")
    named = (choice for choice in _choices(text, counts) if _kind(choice) == _kind(right))
    return _compared(next(named, ""), right)


def _by_choice_or_letter(text: str, answer: str, counts: Mapping[str, int]) -> Found:
    return by_choice(text, answer, counts) if _choices(answer, counts) else by_letter(text, answer)


_RULES: dict[str, Rule] = {"text": by_text, "number": by_number}


def _compared(named: str, right: str) -> Found:
    return Found(named, named == right and right != "")


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text.replace(",", ""))
    return float(found[-1]) if found else None


def _choices(text: str, counts: Mapping[str, int]) -> list[str]:
    """The choices that `text` names, in lower case. "answer9" is no choice if there are five."""
    found = ((match[0].lower(), match[1], match[2]) for match in _CHOICE.finditer(text))
    return [choice for choice, kind, number in found if not kind or int(number) <= counts[kind.lower()]]


def _counts(answers: Iterable[str]) -> dict[str, int]:
    named = [(kind.lower(), int(number)) for text in answers for kind, number, _ in _CHOICE.findall(text) if kind]
    return {kind: max([count, *(n for k, n in named if k == kind)]) for kind, count in CHOICES.items()}


def _kind(choice: str) -> str:
    return "truth" if choice in ("true", "false") else choice.rstrip("0123456789")
