"""The three domains of the text benchmark, in the spirit of the paper: commonsense, arithmetic, code.

Questions come from the generator reasoning_gym, each cut to one line, with its own verifier; none occurs twice.

    "Your task is to unscramble the words … Now, unscramble these words: tenalp"   →   "spell: tenalp"

The generator's item, right answer and verifier are kept: `restore` turns what the model wrote in the short form back
into the generator's own form, which `score_answer` then judges. A family with several right answers (a palindrome of
given letters) counts each of them. Words before the colon are tokens that the shipped models know, where they fit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import cycle
from typing import Any

import reasoning_gym

# ---------------------------------------------------------------------- families

Item = dict[str, Any]

ITEMS = 2**24  # of one seed; reasoning_gym makes item i of seed s from s + i, so neighbouring seeds share all but one
RIGHT = 1.0  # the verifiers give less for an answer that is right in part or in another form


@dataclass(frozen=True)
class Family:
    """How items of one generator become one-line questions.

    Attributes:
        question: item → the question.
        shape: regular expression of an answer in the short form. What else a model writes is wrong, and is kept from
            the verifier: some of them evaluate it as Python.
        answer: item → the answer in the short form.
        restore: an answer in the short form, item → in the generator's.
        arguments: of the generator: how hard its items are.
    """

    question: Callable[[Item], str]
    shape: str
    answer: Callable[[Item], str] = lambda item: item["answer"]
    restore: Callable[[str, Item], str] = lambda text, item: text
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Question:
    """Attributes:
    family: name of its family, which is its generator's.
    text, answer: in the short form.
    item: as the generator made it, for its verifier.
    """

    family: str
    text: str
    answer: str
    item: dict[str, Any] = field(repr=False, compare=False)


_TOKENS = {"A#": "A", "#A": "a", "B#": "B", "#B": "b"}  # of the A::B machine: the # stands right of A, left of a
_LONG = {short: long for long, short in _TOKENS.items()}


def _one_letter_each(program: str) -> str:
    return "".join(_TOKENS[token] for token in program.split())


def _program(item: Item) -> str:
    """The program of an item of "ab", which stands in its question alone."""
    return item["question"].rpartition("following program:\n\n")[2].partition("\n")[0]


def _numbers(texts: list[str]) -> str:
    return " ".join(str(int(float(text))) for text in texts)


FAMILIES: dict[str, Family] = {
    "letter_jumble": Family(
        question=lambda item: f"spell: {item['metadata']['scrambled_words'][0].lower()}",
        shape="[a-z]+",
        answer=lambda item: item["answer"].lower(),
        arguments={
            **{"min_words": 1, "max_words": 1, "min_word_len": 4, "max_word_len": 8},
            **{"min_corruption_level": 0.5, "max_corruption_level": 0.9},
        },
    ),
    "palindrome_generation": Family(
        question=lambda item: f"sort palindrome: {''.join(item['metadata']['letters'])}",
        shape="[a-z]+",
        arguments={"min_length": 5, "max_length": 8},
    ),
    "chain_sum": Family(
        question=lambda item: f"add: {item['metadata']['expression'].replace(' ', '')}",
        shape="-?[0-9]+",
        arguments={"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
    ),
    "number_sorting": Family(
        question=lambda item: f"{item['metadata']['direction']}: {_numbers(item['metadata']['original_numbers'])}",
        shape="[0-9 ]+",
        answer=lambda item: _numbers(item["metadata"]["sorted_numbers"]),
        restore=lambda text, item: str(text.split()),
        arguments={"min_numbers": 3, "max_numbers": 3, "max_decimals": 0, "min_value": 1, "max_value": 99},
    ),
    "ab": Family(
        question=lambda item: f"copy then: {_one_letter_each(_program(item))}",
        shape="[AaBb]+",
        answer=lambda item: _one_letter_each(item["answer"]),
        restore=lambda text, item: " ".join(_LONG[letter] for letter in text),
        arguments={"length": 8},
    ),
    "bitwise_arithmetic": Family(
        question=lambda item: "add: " + item["metadata"]["problem"].replace(" ", ""),
        shape="-?0x[0-9a-f]+",
        arguments={"difficulty": 1},
    ),
}


@cache
def _generator(name: str, seed: int) -> Any:
    return reasoning_gym.create_dataset(name, seed=seed * ITEMS, size=ITEMS, **FAMILIES[name].arguments)


def questions(name: str, seed: int) -> Iterator[Question]:
    """The questions of the family `name` under `seed`, one after another, without end; some come twice."""
    family, generator, index = FAMILIES[name], _generator(name, seed), 0
    while True:
        item = generator[index]
        index += 1
        yield Question(name, family.question(item), family.answer(item), item)


def is_right(question: Question, answer: str) -> bool:
    """Whether the generator's verifier accepts `answer`, which is in the short form, as wholly right."""
    if answer == question.answer:
        return True
    family = FAMILIES[question.family]
    if not re.fullmatch(family.shape, answer):
        return False
    return _generator(question.family, 0).score_answer(family.restore(answer, question.item), question.item) == RIGHT


# ---------------------------------------------------------------------- domains

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
        names = ", ".join(DOMAINS)
        raise ValueError(f"domain is {name!r}, expected one of {names}, or a family: {', '.join(FAMILIES)}")
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
