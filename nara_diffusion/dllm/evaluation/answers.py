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


def compare(extract: str | Callable[[str], str], text: str, answer: str) -> Found:
    """What a generated `text` names by the rule `extract`, and whether that is the right `answer`.

    Args:
        extract: "text", "number", "letter" or "choice"; or a function from text to text, whose values for both texts
            have to be equal.

    Raises:
        ValueError: an unknown name.
    """
    if extract == "number":
        named, right = ([float(n) for n in _NUMBER.findall(words.replace(",", ""))][-1:] for words in (text, answer))
        is_right = bool(named and right) and abs(named[0] - right[0]) <= TOLERANCE
        return Found(format(named[0], ".15g") if named else "", is_right)
    if extract == "choice" and (wanted := _CHOICE.search(answer)):
        kinds = {"true": "truth", "false": "truth"}
        kind = lambda choice: kinds.get(choice, choice[:-1])  # noqa: E731
        right, choices = wanted[0].lower(), [choice.lower() for choice in _CHOICE.findall(text)]
        return _equal(next((choice for choice in choices if kind(choice) == kind(right)), ""), right)
    if extract in ("letter", "choice"):
        return _equal(*("".join(_LETTER.findall(words)[-1:]) for words in (text, answer)))
    if not callable(extract) and extract != "text":
        raise ValueError(f"extract is {extract!r}, expected 'text', 'number', 'letter', 'choice', or a function")
    find = extract if callable(extract) else lambda words: " ".join(words.split())
    return _equal(find(text), find(answer))


def _equal(named: str, right: str) -> Found:
    return Found(named, named == right and right != "")
