"""Writes the fine-tuning task "two-step": one transformation of a word after another, which llada-tiny never saw.

    python examples/assets/makers/make_two_step.py --output_dir outputs/two-step

    {"instruction": "swap then shift: planet", "output": "mqobuf", "answer": "mqobuf"}

llada-tiny is pre-trained on each single transformation ("swap: planet", "shift: lpnate"), but never on two in a row,
nor on the word "then". The files are JSON Lines with the fields of LLM-Adapters: train, validation and test. No two
records, of one file or of two, are about the same letters: exact match on the test file is on unseen words.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

from reasoning_gym.data import read_data_file
from tiny_text.tasks import LETTER_FAMILIES, MAX_LETTERS, random_letters

COMPOSITIONS = (("swap", "shift"), ("rotate", "upper"), ("reverse", "shift"), ("rotate", "unshift"))
SPLITS = {"train": 4000, "validation": 256, "test": 256}
WORD_SHARE = 0.2  # of the subjects; the others are random letters
SEED = 0


def record(first: str, second: str, letters: str) -> dict[str, str]:
    """The question "first then second: letters" with its answer, in LLM-Adapters' fields."""
    answer = LETTER_FAMILIES[second](LETTER_FAMILIES[first](letters))
    return {"instruction": f"{first} then {second}: {letters}", "output": answer, "answer": answer}


def story_words() -> list[str]:
    """The words of 4 to MAX_LETTERS lower-case letters in "In the Year 2889", a story that reasoning_gym has."""
    return sorted(set(re.findall(rf"\b[a-z]{{4,{MAX_LETTERS}}}\b", read_data_file("in_the_year_2889.txt"))))


def splits(seed: int = SEED, sizes: dict[str, int] | None = None) -> dict[str, list[dict[str, str]]]:
    """All records by split; the compositions take turns, a subject is an English word or random letters."""
    rng, words, seen = random.Random(f"two-step-{seed}"), story_words(), set()
    records: dict[str, list[dict[str, str]]] = {}
    for name, size in (sizes or SPLITS).items():
        records[name] = []
        for index in range(size):
            records[name].append(record(*COMPOSITIONS[index % len(COMPOSITIONS)], _unseen_letters(rng, words, seen)))
        rng.shuffle(records[name])
    return records


def _unseen_letters(rng: random.Random, words: list[str], seen: set[str]) -> str:
    while True:
        letters = rng.choice(words) if rng.random() < WORD_SHARE else random_letters(rng, 4, MAX_LETTERS)
        if letters not in seen:
            seen.add(letters)
            return letters


def main(output_dir: Path, seed: int = SEED) -> None:
    output_dir.mkdir(parents=True, exist_ok=True)
    for name, records in splits(seed).items():
        lines = [json.dumps(item) + "\n" for item in records]
        (output_dir / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, default=Path("outputs/two-step"), help="folder of the files (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=SEED, help="of the words and letters (default: %(default)s)")
    main(**vars(parser.parse_args()))
