"""What is learned: questions that gemma-tiny was not pre-trained on, as token ids with one canvas behind each prompt.

plain  the shipped unseen task
case   the same, each letter of an answer in a random case: the prompt says which letters
open   random characters: neither the prompt nor the rest of an answer says anything of a character; eight fewer
       than the canvas has positions
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from benchmark_record import ROOT
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nara_diffusion.dllm.encoding import encode_records
from nara_diffusion.dllm.records import normalized
from quality.images.held_out import BINS
from quality.regimes.text.data import CHARACTERS, SEED

EACH_BIN = 80  # held-out questions
TRAIN = 4000
SAMPLED = 128
_SHIPPED = ROOT / "examples" / "assets" / "two-step"
_LONGEST = 400  # tokens


@dataclass(frozen=True)
class CanvasRows:
    """n questions.

    Attributes:
        rows: as `exact_match` takes them.
        input_ids: (n, l), each answer padded with end tokens to its canvas, and to l.
        prompt_lengths: (n,).
        canvas: c, the positions of an answer.
    """

    rows: list[dict]
    input_ids: Tensor
    prompt_lengths: Tensor
    canvas: int

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Task:
    """Attributes:
    train, held_out: what is learned from, and BINS · n rows that no training sees, n for each bin of λ.
    sampled: whose answers are generated; None if a generated answer can't be right.
    """

    train: CanvasRows
    held_out: CanvasRows
    sampled: CanvasRows | None


def load_task(name: str, tokenizer: PreTrainedTokenizerBase, canvas: int) -> Task:
    """The task `name` for a model with a canvas of c positions."""
    if name == "open":
        questions = list(islice(_open_questions(canvas - 8), BINS * EACH_BIN + TRAIN))
        held_out = encoded(questions[: BINS * EACH_BIN], tokenizer, canvas)
        return Task(encoded(questions[-TRAIN:], tokenizer, canvas), held_out, None)
    parts = {part: _rows_of(part) for part in ("train", "test", "validation")}
    if name == "case":
        parts = {part: list(_in_random_case(rows, part)) for part, rows in parts.items()}
    train, test, validation = parts.values()
    held_out = (test * BINS)[: BINS * EACH_BIN]  # each is met at some λ
    return Task(
        encoded(train, tokenizer, canvas),
        encoded(held_out, tokenizer, canvas),
        encoded(validation[:SAMPLED], tokenizer, canvas),
    )


def _open_questions(length: int) -> Iterator[dict[str, str]]:
    """ "code 41352" → "k7rqx0d3": questions without end, none of which comes twice."""
    rng = random.Random(SEED)
    for number in rng.sample(range(10000, 100000), 90000):
        yield {"instruction": f"code {number}", "output": "".join(rng.choices(CHARACTERS, k=length))}


def _rows_of(part: str) -> list[dict[str, str]]:
    lines = (_SHIPPED / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _in_random_case(rows: list[dict[str, str]], part: str) -> Iterator[dict[str, str]]:
    for index, row in enumerate(rows):
        rng = random.Random(f"{part} {index}")
        answer = "".join(rng.choice((letter.lower(), letter.upper())) for letter in row["output"])
        yield {"instruction": row["instruction"], "output": answer, "answer": answer}


def encoded(records: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, canvas: int) -> CanvasRows:
    """Records as token ids.

    Raises:
        ValueError: an answer is longer than a canvas.
    """
    rows = list(encode_records(normalized(records, source="blocks"), tokenizer, max_length=_LONGEST).rows)
    prompt_lengths = torch.tensor([row["prompt_length"] for row in rows])
    input_ids = torch.full((len(rows), int(prompt_lengths.max()) + canvas), tokenizer.eos_token_id)
    for line, row in zip(input_ids, rows, strict=True):
        ids = row["input_ids"]
        if len(ids) > row["prompt_length"] + canvas:
            raise ValueError(f"{row['answer']!r} is longer than a canvas of {canvas} positions.")
        line[: len(ids)] = torch.tensor(ids)
    return CanvasRows(rows, input_ids, prompt_lengths, canvas)
