"""Rules that find the answer in a generated text and compare it, for `exact_match` and nara-eval's tasks.

    text     the whole text, with runs of white space as one space
    number   the last number, commas left out, equal to the right answer's last within 0.001
    letter   the last of A … E that stands alone
    choice   the first of answer1 … answer5, ending1 … ending4, option1, option2, solution1, solution2, true, false that
             is of the right answer's kind; the rule letter where the right answer names none of them

The last three are those of LLM-Adapters (arXiv 2304.01933). Its own scripts differ where a word contains a choice: "A"
of "Answer" and "true" of "untrue" are named there, and not here; and "True" is named here, and not there.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

TOLERANCE = 1e-3
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_LETTER = re.compile(r"\b[A-E]\b")
_CHOICE = re.compile(r"\b(?:answer[1-5]|ending[1-4]|option[12]|solution[12]|true|false)\b", re.IGNORECASE)


class Found(NamedTuple):
    """Attributes:
    named: the answer that the text names, "" if it names none.
    is_right: whether that equals the right answer.
    """

    named: str
    is_right: bool


Rule = Callable[[str, str], Found]
"""(generated text, right answer) → `Found`."""


def rule_of(extract: str | Callable[[str], str]) -> Rule:
    """The rule of the name `extract`; of a function from text to text: its values for both have to be equal.

    Raises:
        ValueError: an unknown name.
    """
    if callable(extract):
        return lambda text, answer: _compared(extract(text), extract(answer))
    if extract not in _RULES:
        raise ValueError(f"extract is {extract!r}, expected one of {', '.join(map(repr, _RULES))}, or a function")
    return _RULES[extract]


def by_text(text: str, answer: str) -> Found:
    """Compare the texts, with runs of white space as one space."""
    return _compared(*(" ".join(words.split()) for words in (text, answer)))


def by_number(text: str, answer: str) -> Found:
    """Compare the last number of the text with the answer's last one."""
    named, right = ([float(number) for number in _NUMBER.findall(words.replace(",", ""))] for words in (text, answer))
    is_right = bool(named and right) and abs(named[-1] - right[-1]) <= TOLERANCE
    return Found(format(named[-1], ".15g") if named else "", is_right)


def by_letter(text: str, answer: str) -> Found:
    """Compare the last letter A … E of the text with the answer's last one."""
    return _compared(*(next(iter(_LETTER.findall(words)[-1:]), "") for words in (text, answer)))


def by_choice(text: str, answer: str) -> Found:
    """Compare the first choice of the answer's kind in the text with the answer's first one."""
    named, right = ([choice.lower() for choice in _CHOICE.findall(words)] for words in (text, answer))
    if not right:
        return by_letter(text, answer)
    return _compared(next((choice for choice in named if _kind(choice) == _kind(right[0])), ""), right[0])


_RULES: dict[str, Rule] = {"text": by_text, "number": by_number, "letter": by_letter, "choice": by_choice}


def _compared(named: str, right: str) -> Found:
    return Found(named, named == right and right != "")


def _kind(choice: str) -> str:
    return "truth" if choice in ("true", "false") else choice[:-1]
