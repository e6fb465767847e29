"""Batches of rows: their padding, and the order in which training sees them."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset

from nara_diffusion.dllm import AnswerCollator, masked_diffusion_loss
from nara_diffusion.dllm.batches import GlobalBatchStream, with_longest
from nara_diffusion.dllm.records import with_column
from nara_diffusion.utils.data_order import stream_loader
from tests.acceptance._text import backbone, nara
from tests.helpers.word_rows import END, chat, encoded

COLLATOR = AnswerCollator(END, "longest")


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


@pytest.mark.parametrize("grouped", [False, True])
def test_stream_begun_anywhere_gives_the_same_rows(conversations: Dataset, grouped: bool) -> None:
    lengths = COLLATOR.row_lengths(conversations) if grouped else None
    full = [GlobalBatchStream(conversations, 3, 4, lengths)[position] for position in range(60)]
    resumed = GlobalBatchStream(conversations, 3, 4, lengths)
    assert [resumed[position] for position in range(29, 60, 2)] == full[29::2]
    other = GlobalBatchStream(conversations, 4, 4, lengths)
    assert [other[position]["input_ids"] for position in range(60)] != [row["input_ids"] for row in full]


def test_stream_without_lengths_has_torch_s_order(conversations: Dataset) -> None:
    """The order of version 0.2, which its runs are repeated by."""
    single = conversations.filter(lambda row: row["record"] % 4 == 0).remove_columns("record")
    rows = with_column(single, "record", range(3))
    stream, expected = GlobalBatchStream(rows, seed=3, global_batch=2), []
    for epoch in range(5):
        expected += torch.randperm(3, generator=torch.Generator().manual_seed(3_000_009 + epoch)).tolist()
    assert [stream[position]["record"] for position in range(15)] == expected


# ---------------------------------------------------------------------- batches by length


def lognormal(count: int, seed: int = 0) -> np.ndarray:
    """Lengths with a mean of 202 tokens, at most 811."""
    drawn = np.random.default_rng(seed).lognormal(math.log(202) - 0.18, 0.6, count)
    return drawn.round().clip(8, 811).astype(int)


def stream_of(lengths: np.ndarray, global_batch: int, is_grouped: bool = True) -> GlobalBatchStream:
    rows = Dataset.from_dict({"record": np.arange(len(lengths), dtype=np.int32)})
    return GlobalBatchStream(rows, 5, global_batch, lengths if is_grouped else None)


@pytest.mark.parametrize(("count", "batch"), [(37, 4), (64, 8), (7, 12), (12, 12), (1, 3)])
def test_grouped_epoch_has_each_row_once(count: int, batch: int) -> None:
    lengths = lognormal(count)
    stream = stream_of(lengths, batch)
    epochs = [[stream.sample_at(p) for p in range(e * count, (e + 1) * count)] for e in range(9)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if count > batch > 1:
        batches = {frozenset(epoch[:batch]) for epoch in epochs}
        assert len(batches) > 4  # other rows share a batch in other epochs


@pytest.mark.parametrize(("size", "forwards"), [(8, 1), (8, 4), (4, 1)])
def test_grouped_forwards_take_few_positions_a_token(size: int, forwards: int) -> None:
    lengths, shares = lognormal(8000), []
    for is_grouped in (True, False):
        stream = stream_of(lengths, size * forwards, is_grouped)
        longest = lengths[[stream.sample_at(p) for p in range(8000)]].reshape(-1, size).max(1)
        shares.append(longest.sum() * size / lengths.sum())
        assert abs(np.corrcoef(np.arange(len(longest)), longest)[0, 1]) < 0.1  # in random order
    assert shares[0] <= 1.02
    assert shares[1] > 1.6


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_the_forwards_of_one(conversations: Dataset, processes: int) -> None:
    """Each forward, and so its padding, is the same wherever it runs."""
    stream = GlobalBatchStream(conversations, 3, 8, COLLATOR.row_lengths(conversations))
    shards = []
    for process in range(processes):
        loader = stream_loader(stream, COLLATOR, 2, range(8, 40))
        options: dict[str, Any] = {"num_processes": processes, "process_index": process}
        shards.append(list(prepare_data_loader(loader, put_on_device=False, **options)))
    forwards = [forward for together in zip(*shards, strict=True) for forward in together]
    assert [forward["sample_indices"] for forward in forwards] == [[p, p + 1] for p in range(8, 40, 2)]
    for forward in forwards:
        batch = COLLATOR([stream[position] for position in forward["sample_indices"]])
        assert torch.equal(batch.pop("input_ids"), forward.pop("input_ids"))
        assert batch == forward


@pytest.mark.parametrize(
    ("collator", "expected"),
    [
        (AnswerCollator(END, "longest"), [4, 7, 8]),
        (AnswerCollator(END, 2), [6, 9, 8]),
        (AnswerCollator(END, "gen_length", gen_length=5), [7, 7, 8]),
        (AnswerCollator(END, 0, multiple=4), [6, 9, 8]),
    ],
)
def test_length_of_a_row_includes_its_trained_padding(collator: AnswerCollator, expected: list[int]) -> None:
    rows = {
        "input_ids": [[7, 8, 9, END], [7, 8, 9, 10, 11, 12, END], [7, 8, 9, 10, 11, 12, 13, 14]],
        "prompt_length": [2, 1, 5],
        "length": [4, 7, 11],  # the last answer is cut
    }
    lengths = collator.row_lengths(Dataset.from_dict(rows))
    assert lengths.tolist() == expected
    listed = [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]
    assert [sum(collator([row])[f"{part}_lengths"][0] for part in ("prompt", "answer")) for row in listed] == expected


@pytest.mark.parametrize("is_grouped", [False, True])
def test_validation_rows_are_padded_as_forwards_of_training(conversations: Dataset, is_grouped: bool) -> None:
    lengths = [len(ids) for ids in conversations["input_ids"]]
    longest = with_longest(conversations, 4, is_grouped)[:]["longest"]
    neighbours = sorted(range(30), key=lengths.__getitem__) if is_grouped else list(range(30))
    for first in range(0, 30, 4):
        group = neighbours[first : first + 4]
        assert {longest[i] for i in group} == {max(lengths[i] for i in group)}


@pytest.mark.parametrize("padding", ["longest", "gen_length", "3"])
def test_epoch_gradients_average_to_those_of_one_batch(conversations: Dataset, padding: str) -> None:
    """Samples of unequal lengths have equal weights, however they are put into forwards."""
    model = nara(backbone(40)).double()
    collator = AnswerCollator(END, padding, gen_length=9)
    stream = GlobalBatchStream(conversations, 3, 4, collator.row_lengths(conversations))
    weights = [weight for weight in model.parameters() if weight.requires_grad]

    def gradients(positions: range, answers: list[int] | None = None) -> list[Any]:
        rows = collator([stream[position] for position in positions])
        rows["answer_lengths"] = answers or rows["answer_lengths"]
        loss = masked_diffusion_loss(model, **rows, seed=1, group_size=4).loss
        return [rows, *torch.autograd.grad(loss, weights)]

    parts = [gradients(range(first, first + 2)) for first in range(0, 12, 2)]
    widths = {rows["input_ids"].shape[1] for rows, *_ in parts}
    assert len(widths) > 2
    answers = [length for rows, *_ in parts for length in rows["answer_lengths"]]
    _, *expected = gradients(range(12), answers)
    means = [torch.stack(values).mean(0) for values in zip(*(values for _, *values in parts), strict=True)]
    scale = max(float(value.abs().max()) for value in expected)
    torch.testing.assert_close(means, expected, rtol=1e-5, atol=1e-5 * scale)  # C is float32
