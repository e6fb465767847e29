"""What llada-tiny is pre-trained on: one-line questions with short answers, in two groups of families.

``LETTER_FAMILIES`` transform a string that is either random letters or an English word from reasoning_gym's word list.
``GYM_FAMILIES`` are tasks of the maintained generator reasoning_gym. Its items and answers are kept, its long questions
are cut to one line, so that a question fits into a dozen tokens:

    "How many times does the letter "h" appear in the text: "hundred"?"   →   "count h: hundred"

No family applies one transformation after another; that is what the fine-tuning task asks for (see make_two_step.py).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice

import reasoning_gym
from reasoning_gym.data import read_data_file

from .tokenizer import WORDS

Question = tuple[str, str]  # instruction, answer

MAX_LETTERS = 7
MAX_HALF = 4  # input letters of the families whose answer is twice as long as their input


def shift(text: str, by: int = 1) -> str:
    """Each lower-case letter replaced by the one that stands ``by`` places later in the alphabet; after z comes a."""
    return "".join(chr((ord(letter) - ord("a") + by) % 26 + ord("a")) for letter in text)


def swap(text: str) -> str:
    """Neighbours exchanged: abcde → badce; a last letter without neighbour stays."""
    return "".join(text[i : i + 2][::-1] for i in range(0, len(text), 2))


LETTER_FAMILIES: dict[str, Callable[[str], str]] = {
    "copy": lambda text: text,
    "upper": str.upper,
    "shift": shift,
    "unshift": lambda text: shift(text, -1),
    "reverse": lambda text: text[::-1],
    "swap": swap,
    "rotate": lambda text: text[1:] + text[:1],
    "sort": lambda text: "".join(sorted(text)),
    "double": lambda text: text + text,
    "palindrome": lambda text: text + text[::-1],
}


def _spell_backward(entry: dict) -> Question:
    return f"spell backward: {entry['metadata']['word']}", entry["answer"]


def _letter_counting(entry: dict) -> Question:
    metadata = entry["metadata"]
    return f"count {metadata['target_letter']}: {metadata['span'][0]}", entry["answer"]


def _number_sorting(entry: dict) -> Question:
    metadata = entry["metadata"]
    numbers, answer = ([str(int(float(x))) for x in metadata[key]] for key in ("original_numbers", "sorted_numbers"))
    return f"{metadata['direction']}: {' '.join(numbers)}", " ".join(answer)


def _word_sorting(entry: dict) -> Question:
    metadata = entry["metadata"]
    return f"{metadata['direction']}: {' '.join(metadata['original_words'])}", " ".join(metadata["sorted_words"])


def _chain_sum(entry: dict) -> Question:
    return f"add: {entry['metadata']['expression']}", entry["answer"]


def _products(entry: dict) -> Question:
    return f"multiply: {entry['metadata']['expression']}", entry["answer"]


GYM_FAMILIES: dict[str, tuple[Callable[[dict], Question], dict]] = {
    "spell_backward": (_spell_backward, {"min_word_len": 3, "max_word_len": MAX_LETTERS}),
    "letter_counting": (_letter_counting, {"min_words": 1, "max_words": 1}),
    "number_sorting": (
        _number_sorting,
        {"min_numbers": 3, "max_numbers": 4, "max_decimals": 0, "min_value": 0, "max_value": 9},
    ),
    "word_sorting": (_word_sorting, {"min_words": 2, "max_words": 2, "min_word_length": 3, "max_word_length": 4}),
    "chain_sum": (_chain_sum, {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}),
    "products": (_products, {"min_digits": 1, "max_digits": 1}),
}
FAMILIES = (*LETTER_FAMILIES, *GYM_FAMILIES)
MAX_SUBJECT = 9  # characters after the colon
GYM_ITEMS = 2**24  # questions that reasoning_gym can be asked for under one seed


@cache
def english_words() -> tuple[str, ...]:
    """The lower-case words of 4 to ``MAX_LETTERS`` letters of reasoning_gym's list, without the tokenizer's own."""
    words = re.findall(rf"^[a-z]{{4,{MAX_LETTERS}}}$", read_data_file("words3to10.txt"), re.MULTILINE)
    return tuple(word for word in words if word not in WORDS)


def random_letters(rng: random.Random, shortest: int, longest: int) -> str:
    """A string of lower-case letters that isn't one of the tokenizer's words."""
    while True:
        text = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(shortest, longest)))
        if text not in WORDS:
            return text


def letter_questions(name: str, seed: int) -> Iterator[Question]:
    """Endless questions of one of LETTER_FAMILIES; every other one, on average, is about an English word."""
    rng, words = random.Random(f"{name}-{seed}"), english_words()
    halved = name in ("double", "palindrome")
    if halved:
        words = tuple(word for word in words if len(word) <= MAX_HALF)
    lengths = (2, MAX_HALF) if halved else (4, MAX_LETTERS)
    while True:
        text = rng.choice(words) if rng.random() < 0.5 else random_letters(rng, *lengths)
        yield f"{name}: {text}", LETTER_FAMILIES[name](text)


def gym_questions(name: str, seed: int) -> Iterator[Question]:
    """The questions of one of GYM_FAMILIES, without those that are too long for the model."""
    rewrite, arguments = GYM_FAMILIES[name]
    # reasoning_gym makes item i of seed s from s + i, so neighbouring seeds would share all items but one
    dataset = reasoning_gym.create_dataset(name, seed=seed * GYM_ITEMS, size=GYM_ITEMS, **arguments)
    index = 0
    while True:
        question, answer = rewrite(dataset[index])
        index += 1
        if len(question.partition(": ")[2]) <= MAX_SUBJECT:
            yield question, answer


def questions(name: str, count: int, seed: int) -> list[Question]:
    """The first ``count`` questions of the family ``name`` under ``seed``."""
    stream = letter_questions(name, seed) if name in LETTER_FAMILIES else gym_questions(name, seed)
    return list(islice(stream, count))
