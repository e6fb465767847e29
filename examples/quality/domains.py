"""The three domains of the text benchmark, in the spirit of the paper's: commonsense, arithmetic, code.

Every domain has questions to learn from, others to choose by (validation) and others again to report on (test). No
question occurs twice, in one of them or in two.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import cycle

from quality.families import FAMILIES, Question, questions

SEED = 4
MAX_QUESTION, MAX_ANSWER = 24, 12  # characters


@dataclass(frozen=True)
class Domain:
    """Attributes: each a list of questions in which the families take turns."""

    train: list[Question]
    validation: list[Question]
    test: list[Question]

    @property
    def longest_answer(self) -> int:
        """In characters."""
        return max(len(question.answer) for part in (self.train, self.validation, self.test) for question in part)


DOMAINS: dict[str, tuple[str, ...]] = {
    "commonsense": ("letter_jumble", "palindrome_generation"),
    "arithmetic": ("chain_sum", "prime_factorization"),
    "code": ("ab", "spiral_matrix"),
}


@cache
def build_domain(name: str, train: int = 20000, validation: int = 1024, test: int = 256) -> Domain:
    """The questions of the domain `name` (or of the single family of that name), always the same.

    Raises:
        ValueError: unknown name.
    """
    if name not in DOMAINS and name not in FAMILIES:
        raise ValueError(
            f"domain is {name!r}, expected one of {', '.join(DOMAINS)}, or a family: {', '.join(FAMILIES)}"
        )
    streams = cycle([questions(family, SEED) for family in DOMAINS.get(name, (name,))])
    seen: set[str] = set()

    def draw(count: int) -> list[Question]:
        drawn: list[Question] = []
        while len(drawn) < count:
            question = next(next(streams))
            if question.text not in seen and _fits(question):
                seen.add(question.text)
                drawn.append(question)
        return drawn

    held_out = draw(test), draw(validation)  # first, so that they don't depend on how many are learned from
    return Domain(train=draw(train), validation=held_out[1], test=held_out[0])


def _fits(question: Question) -> bool:
    """Whether it is as short as the shipped models need it, and no question that is its own answer."""
    subject = question.text.partition(": ")[2]
    return len(question.text) <= MAX_QUESTION and 0 < len(question.answer) <= MAX_ANSWER and subject != question.answer
