"""Question families of the maintained generator reasoning_gym, each cut to one line, with its own verifier.

    "Your task is to unscramble the words … Now, unscramble these words: tenalp"   →   "spell: tenalp"

The generator's item, right answer and verifier are kept: `restore` turns what the model wrote in the short form back
into the generator's own form, which `score_answer` then judges. A family with several right answers (a palindrome from
given letters) counts each of them. Words before the colon are tokens that the shipped models know, where they fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import reasoning_gym

ITEMS = 2**24  # of one seed; reasoning_gym makes item i of seed s from s + i, so neighbouring seeds share all but one
RIGHT = 1.0  # the verifiers give less for an answer that is right in part or in another form


@dataclass(frozen=True)
class Family:
    """How items of one generator become one-line questions.

    Attributes:
        question: item → the question.
        answer: item → the answer in the short form.
        restore: an answer in the short form → in the generator's.
        arguments: of the generator: how hard its items are.
    """

    question: Callable[[dict[str, Any]], str]
    answer: Callable[[dict[str, Any]], str] = lambda item: item["answer"]
    restore: Callable[[str], str] = str
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


def _matrix(item: dict[str, Any]) -> str:
    return "".join(str(entry) for row in item["metadata"]["matrix"] for entry in row)


FAMILIES: dict[str, Family] = {
    # knowledge of words
    "letter_jumble": Family(
        question=lambda item: f"spell: {item['metadata']['scrambled_words'][0].lower()}",
        answer=lambda item: item["answer"].lower(),
        arguments={
            **{"min_words": 1, "max_words": 1, "min_word_len": 4, "max_word_len": 8},
            **{"min_corruption_level": 0.5, "max_corruption_level": 0.9},
        },
    ),
    "palindrome_generation": Family(
        question=lambda item: f"sort palindrome: {''.join(item['metadata']['letters'])}",
        arguments={"min_length": 5, "max_length": 8},
    ),
    "leg_counting": Family(
        question=lambda item: "count: " + " ".join(f"{n} {name}" for name, n in item["metadata"]["animals"].items()),
        arguments={"min_animals": 2, "max_animals": 2, "max_instances": 9},
    ),
    # arithmetic
    "chain_sum": Family(
        question=lambda item: f"add: {item['metadata']['expression'].replace(' ', '')}",
        arguments={"min_terms": 3, "max_terms": 4, "min_digits": 1, "max_digits": 2},
    ),
    "products": Family(
        question=lambda item: f"multiply: {item['metadata']['expression'].replace(' ', '')}",
        arguments={"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
    ),
    "prime_factorization": Family(
        question=lambda item: f"multiply backward: {item['metadata']['number']}",
        answer=lambda item: item["answer"].replace(" × ", "*"),
        restore=lambda text: " × ".join(text.split("*")),
        arguments={"min_value": 2, "max_value": 99999},
    ),
    "lcm": Family(
        question=lambda item: "lcm: {} {}".format(*item["metadata"]["numbers"]), arguments={"max_value": 200}
    ),
    # programs
    "ab": Family(
        question=lambda item: "copy then: " + _one_letter_each(_program(item)),
        answer=lambda item: _one_letter_each(item["answer"]),
        restore=lambda text: " ".join(_LONG.get(letter, letter) for letter in text),
        arguments={"length": 8},
    ),
    "string_insertion": Family(
        question=lambda item: f"double then: {item['metadata']['string']}",
        arguments={"min_string_length": 6, "max_string_length": 8},
    ),
    "spiral_matrix": Family(
        question=lambda item: f"rotate then: {_matrix(item)}",
        answer=lambda item: "".join(map(str, item["metadata"]["solution"])),
        restore=" ".join,
        arguments={"min_n": 3, "max_n": 3},
    ),
    "rotate_matrix": Family(
        question=lambda item: f"rotate {item['metadata']['num_rotations']}: {_matrix(item)}",
        answer=lambda item: "".join(str(entry) for row in item["metadata"]["solution"] for entry in row),
        restore=lambda text: "\n".join(" ".join(text[i : i + 3]) for i in range(0, len(text), 3)),
        arguments={"min_n": 3, "max_n": 3, "min_rotations": 1, "max_rotations": 3},
    ),
}


def _program(item: dict[str, Any]) -> str:
    """The program of an item of "ab", which stands in its question alone."""
    return item["question"].rpartition("following program:\n\n")[2].partition("\n")[0]


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
    restored = FAMILIES[question.family].restore(answer)
    return _generator(question.family, 0).score_answer(restored, question.item) == RIGHT
