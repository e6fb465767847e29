"""Three rows of prompt and answer, as a batch; the inputs of a model; and the surprise at masked tokens by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tests.acceptance._text import END, PAD, ByHand

VOCABULARY = 30
MASK = VOCABULARY - 1
ROWS = [[5, 9, 11, 4, 6, 20, 8, END, END], [7, 21, 8, 21, 3, END], [12, 4, 9, 25, 16, 10, 17, END]]
PROMPTS = [3, 2, 4]


def batch(rows: list[int] | None = None) -> dict[str, Any]:
    """ROWS, or some of them, padded on the right."""
    rows = list(range(len(ROWS))) if rows is None else rows
    width = max(len(ROWS[i]) for i in rows)
    ids = torch.tensor([ROWS[i] + [PAD] * (width - len(ROWS[i])) for i in rows])
    prompts, answers = [PROMPTS[i] for i in rows], [len(ROWS[i]) - PROMPTS[i] for i in rows]
    return {"input_ids": ids, "prompt_lengths": prompts, "answer_lengths": answers}


@contextmanager
def inputs_of(model: Any) -> Iterator[list[list[int]]]:
    """The rows of token ids that the model is given."""
    seen: list[list[int]] = []
    hook = lambda _, args, options: seen.extend((args[0] if args else options["input_ids"]).tolist())  # noqa: E731
    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def masked_ids(row: list[int], masked: list[int]) -> list[int]:
    return [MASK if j in masked else token for j, token in enumerate(row)]


def surprise(by_hand: ByHand, row: list[int], masked: list[int], level: float) -> float:
    """Σ − log p of the tokens at the `masked` positions."""
    log_p = by_hand([masked_ids(row, masked)], level)[0].log_softmax(-1)
    return -float(sum(log_p[j, row[j]] for j in masked))
