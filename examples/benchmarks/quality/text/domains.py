"""The three domains of the text benchmark, in the spirit of the paper's: commonsense, arithmetic, code.

No question occurs twice, in one part of a domain or in two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import cycle

from quality.text.families import FAMILIES, Question, questions

SEED = 4
PATIENCE = 5000  # questions in a row that were seen before or don't fit
MAX_QUESTION, MAX_ANSWER = 24, 9  # characters
PARTS = ("train", "tuning", "validation", "test")


@dataclass(frozen=True)
class Domain:
    """Questions, of which the families take turns.

    Attributes:
        train: to learn from.
        tuning: to choose learning rates by.
        validation: whose loss is reported.
        test: whose answers are generated and judged.
    """

    train: list[Question]
    tuning: list[Question]
    validation: list[Question]
    test: list[Question]


DOMAINS: dict[str, tuple[str, ...]] = {
    "commonsense": ("letter_jumble", "palindrome_generation"),
    "arithmetic": ("chain_sum", "number_sorting"),
    "code": ("ab", "bitwise_arithmetic"),
}


@dataclass(frozen=True)
class Sizes:
    """Questions of each part."""

    train: int = 20000
    tuning: int = 512
    validation: int = 3072
    test: int = 256


DEFAULT_SIZES = Sizes()


def sizes_of(given: Sizes | Mapping[str, int]) -> Sizes:
    """`given` as Sizes, which the command line writes as a mapping.

    Raises:
        ValueError: an unknown part, or one without a question.
    """
    if isinstance(given, Sizes):
        return given
    if not given.keys() <= set(PARTS) or any(not isinstance(n, int) or n < 1 for n in given.values()):
        raise ValueError(f"sizes is {dict(given)}, expected a number of questions for any of {', '.join(PARTS)}")
    return Sizes(**given)


@cache
def build_domain(name: str, sizes: Sizes = DEFAULT_SIZES) -> Domain:
    """The questions of the domain `name` (or of the single family of that name), always the same.

    Raises:
        ValueError: unknown name, or a domain that has too few questions.
    """
    if name not in DOMAINS and name not in FAMILIES:
        known = ", ".join(DOMAINS)
        raise ValueError(f"domain is {name!r}, expected one of {known}, or a family: {', '.join(FAMILIES)}")
    streams = cycle([questions(family, SEED) for family in DOMAINS.get(name, (name,))])
    seen: set[str] = set()
    # what is held out first, so that it doesn't depend on how many are learned from
    order = ("test", "validation", "tuning", "train")
    return Domain(**{part: _draw(streams, getattr(sizes, part), seen) for part in order})


def _draw(streams: Iterator[Iterator[Question]], count: int, seen: set[str]) -> list[Question]:
    """`count` questions that aren't in `seen`, which learns them."""
    drawn: list[Question] = []
    tries = 0
    while len(drawn) < count:
        question = next(next(streams))
        tries += 1
        if question.text not in seen and fits(question):
            seen.add(question.text)
            drawn.append(question)
            tries = 0
        elif tries > PATIENCE:
            raise ValueError(f"there are only {len(seen)} different questions: ask for fewer than {len(seen) + count}")
    return drawn


def fits(question: Question) -> bool:
    """Whether it is as short as the shipped models need it, and no question that is its own answer."""
    subject = question.text.partition(": ")[2]
    return len(question.text) <= MAX_QUESTION and 0 < len(question.answer) <= MAX_ANSWER and subject != question.answer
