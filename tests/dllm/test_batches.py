"""Batches of rows: their padding, and the order in which training sees them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from datasets import Dataset

from nara_diffusion.dllm import AnswerCollator
from nara_diffusion.dllm.batches import GlobalBatchStream, with_longest
from tests.helpers.word_rows import END, chat, encoded


@pytest.mark.parametrize(
    ("padding", "trained"),
    [({"trained_padding": 2}, [4, 8, 3]), ({"trained_padding": "gen_length", "gen_length": 5}, [5, 6, 3])],
)
def test_batch_is_padded_and_trains_chosen_end_tokens(padding: dict[str, Any], trained: list[int]) -> None:
    rows = [
        {"input_ids": [7, 8, 9, END], "prompt_length": 2},
        {"input_ids": [7, 8, 9, 10, 11, 12, END], "prompt_length": 1},  # longer than gen_length
        {"input_ids": [7, 8, 9, 10, 11, 12, 13, 14], "prompt_length": 5},  # cut: its end is not known
    ]
    batch = AnswerCollator(END, **padding)(rows)
    width = max(length + row["prompt_length"] for length, row in zip(trained, rows, strict=True))
    padded = [row["input_ids"] + [END] * (width - len(row["input_ids"])) for row in rows]
    assert batch["input_ids"].tolist() == padded
    assert batch["prompt_lengths"] == [2, 1, 5]
    assert batch["answer_lengths"] == trained


# ---------------------------------------------------------------------- a run's rows


@pytest.fixture(scope="module")
def conversations() -> Dataset:
    """12 conversations of one to four answers."""
    return encoded([chat(*[f"w{6 + j}" for j in range(2 + 2 * (i % 4))]) for i in range(12)], train_on="all")


def test_each_pass_draws_one_answer_of_each_conversation(conversations: Dataset) -> None:
    passes, stream = 300, GlobalBatchStream(conversations, seed=3, global_batch=4)
    assert len(stream.samples) == 12
    drawn: Counter[tuple[int, int]] = Counter()
    for epoch in range(passes):
        part = [stream[position] for position in range(12 * epoch, 12 * (epoch + 1))]
        assert sorted(row["record"] for row in part) == list(range(12))
        drawn.update((row["record"], len(row["input_ids"])) for row in part)
    assert len(drawn) == len(conversations) == 3 * (1 + 2 + 3 + 4)
    for (record, _), times in drawn.items():  # each as often as any other, within 5 standard deviations
        share = 1 / (1 + record % 4)
        assert abs(times - share * passes) <= 5 * (passes * share * (1 - share)) ** 0.5


def test_stream_gives_same_rows_from_any_start(conversations: Dataset) -> None:
    full = [GlobalBatchStream(conversations, seed=3, global_batch=4)[position] for position in range(60)]
    resumed = GlobalBatchStream(conversations, seed=3, global_batch=4)
    assert [resumed[position] for position in range(29, 60, 2)] == full[29::2]
    for first in range(0, 60, 4):
        batch = full[first : first + 4]
        assert {row["longest"] for row in batch} == {max(len(row["input_ids"]) for row in batch)}
    held_out = with_longest(conversations, 4)[:]
    lengths = [len(ids) for ids in held_out["input_ids"]]
    assert held_out["longest"] == [max(lengths[i - i % 4 :][:4]) for i in range(len(lengths))]
    other = GlobalBatchStream(conversations, seed=4, global_batch=4)
    assert [other[position]["input_ids"] for position in range(60)] != [row["input_ids"] for row in full]
