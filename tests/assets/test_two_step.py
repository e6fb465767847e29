"""The fine-tuning task: its files are what its maker makes, their questions are right, and the model never met them."""

import json
from pathlib import Path

import pytest

pytest.importorskip("reasoning_gym")

import make_two_step
from tiny_text.tasks import FAMILIES, questions

TASK = Path(__file__).parents[2] / "examples" / "assets" / "two-step"
ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def read(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (TASK / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def solve(instruction: str) -> str:
    """The answer by a second route: tables of letters and indices in place of the maker's functions."""
    tasks, letters = instruction.split(": ")
    for task in tasks.split(" then "):
        n = len(letters)
        if task in ("shift", "unshift"):
            moved = ALPHABET[1:] + "a" if task == "shift" else "z" + ALPHABET[:-1]
            letters = letters.translate(str.maketrans(ALPHABET, moved))
        elif task == "upper":
            letters = letters.translate(str.maketrans(ALPHABET, "ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
        else:
            order = {
                "swap": [i ^ 1 if i ^ 1 < n else i for i in range(n)],
                "rotate": [(i + 1) % n for i in range(n)],
                "reverse": [n - 1 - i for i in range(n)],
            }[task]
            letters = "".join(letters[i] for i in order)
    return letters


def test_the_files_are_what_the_maker_makes(tmp_path: Path) -> None:
    make_two_step.main(tmp_path)
    for name in make_two_step.SPLITS:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (TASK / f"{name}.jsonl").read_bytes()


@pytest.mark.parametrize("name", list(make_two_step.SPLITS))
def test_every_answer_is_right_and_every_composition_is_asked(name: str) -> None:
    records = read(name)
    assert len(records) == make_two_step.SPLITS[name]
    assert all(item["answer"] == item["output"] == solve(item["instruction"]) for item in records)
    asked = [item["instruction"].split(": ")[0] for item in records]
    shares = {f"{first} then {second}": len(records) // 4 for first, second in make_two_step.COMPOSITIONS}
    assert {task: asked.count(task) for task in set(asked)} == shares


def test_no_two_records_are_about_the_same_letters() -> None:
    letters = [item["instruction"].split(": ")[1] for name in make_two_step.SPLITS for item in read(name)]
    assert len(letters) == len(set(letters))


def test_another_seed_makes_other_records() -> None:
    sizes = {"train": 12}
    first, second = make_two_step.splits(0, sizes), make_two_step.splits(1, sizes)
    assert first == make_two_step.splits(0, sizes)
    assert not {item["instruction"] for item in first["train"]} & {item["instruction"] for item in second["train"]}


def test_pretraining_never_asks_for_two_steps() -> None:
    for family in FAMILIES:
        for question, _ in questions(family, 300, seed=0):
            assert "then" not in question.split(": ")[0]
    asked = {item["instruction"].split(": ")[0] for name in make_two_step.SPLITS for item in read(name)}
    assert asked.isdisjoint(FAMILIES)
