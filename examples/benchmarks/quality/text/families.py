"""Question families of the maintained generator reasoning_gym, each cut to one line, with its own verifier.

    "Your task is to unscramble the words … Now, unscramble these words: tenalp"   →   "spell: tenalp"

The generator's item, right answer and verifier are kept: `restore` turns what the model wrote in the short form back
into the generator's own form, which `score_answer` then judges. A family with several right answers (a palindrome of
given letters) counts each of them. Words before the colon are tokens that the shipped models know, where they fit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import reasoning_gym

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


def _cells(board: list[list[int]]) -> str:
    """Row after row, a digit each, "0" where a cell is empty."""
    return "".join(str(cell) for row in board for cell in row)


def _rows(cells: str, width: int) -> str:
    return "\n".join(" ".join(cells[start : start + width]) for start in range(0, len(cells), width))


def _missing(item: Item) -> str:
    """The digits of a sudoku's empty cells."""
    puzzle, solution = _cells(item["metadata"]["puzzle"]), _cells(item["metadata"]["solution"])
    return "".join(digit for given, digit in zip(puzzle, solution, strict=True) if given == "0")


def _filled(text: str, item: Item) -> str:
    digits = iter(text)
    cells = "".join(next(digits, "0") if given == "0" else given for given in _cells(item["metadata"]["puzzle"]))
    return _rows(cells, 4)


# Knowledge of words, and constraints that all parts of an answer have to meet together.
_WORDS = {
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
    "leg_counting": Family(
        question=lambda item: "count: " + " ".join(f"{n} {name}" for name, n in item["metadata"]["animals"].items()),
        shape="[0-9]+",
        arguments={"min_animals": 2, "max_animals": 2, "max_instances": 9},
    ),
    "mini_sudoku": Family(
        question=lambda item: f"count: {_cells(item['metadata']['puzzle'])}",
        shape="[1-4]+",
        answer=_missing,
        restore=_filled,
        arguments={"min_empty": 8, "max_empty": 9},
    ),
}
_ARITHMETIC = {
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
    "products": Family(
        question=lambda item: f"multiply: {item['metadata']['expression'].replace(' ', '')}",
        shape="[0-9]+",
        arguments={"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
    ),
    "prime_factorization": Family(
        question=lambda item: f"multiply backward: {item['metadata']['number']}",
        shape="[0-9*]+",
        answer=lambda item: item["answer"].replace(" × ", "*"),
        restore=lambda text, item: " × ".join(text.split("*")),
        arguments={"min_value": 2, "max_value": 99999},
    ),
    "lcm": Family(
        question=lambda item: "multiply: {} {}".format(*item["metadata"]["numbers"]),
        shape="[0-9]+",
        arguments={"max_value": 200},
    ),
}
_PROGRAMS = {
    "ab": Family(
        question=lambda item: f"copy then: {_one_letter_each(_program(item))}",
        shape="[AaBb]+",
        answer=lambda item: _one_letter_each(item["answer"]),
        restore=lambda text, item: " ".join(_LONG[letter] for letter in text),
        arguments={"length": 8},
    ),
    "spiral_matrix": Family(
        question=lambda item: f"rotate then: {_cells(item['metadata']['matrix'])}",
        shape="[0-9]+",
        answer=lambda item: "".join(map(str, item["metadata"]["solution"])),
        restore=lambda text, item: " ".join(text),
        arguments={"min_n": 3, "max_n": 3},
    ),
    "rotate_matrix": Family(
        question=lambda item: f"rotate {item['metadata']['num_rotations']}: {_cells(item['metadata']['matrix'])}",
        shape="[0-9]+",
        answer=lambda item: _cells(item["metadata"]["solution"]),
        restore=lambda text, item: _rows(text, 3),
        arguments={"min_n": 3, "max_n": 3, "min_rotations": 1, "max_rotations": 3},
    ),
    "bitwise_arithmetic": Family(
        question=lambda item: "add: " + item["metadata"]["problem"].replace(" ", ""),
        shape="-?0x[0-9a-f]+",
        arguments={"difficulty": 1},
    ),
    "base_conversion": Family(
        question=lambda item: "count {source_base} then {target_base}: {source_repr}".format(**item["metadata"]),
        shape="[0-9a-f]+",
        arguments={"max_value": 4000},
    ),
}
FAMILIES: dict[str, Family] = {**_WORDS, **_ARITHMETIC, **_PROGRAMS}


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
