"""Where the answers of a batch are: positions (b, l), found on the CPU from lengths (b,)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

Lengths = torch.Tensor | Sequence[int]
"""Lengths or indices. Pass lists or CPU tensors: the host needs the values, and would have to wait
for any other device."""


def answer_positions(
    input_ids: torch.Tensor,
    prompt_lengths: Lengths,
    *,
    answer_lengths: Lengths | None = None,
) -> torch.Tensor:
    """Return the positions of the answers: (b, l) bool.

    Raises:
        ValueError: the lengths aren't one whole number for each row, or an answer is empty or
            longer than its row.
    """
    return moved(host_answers(input_ids, prompt_lengths, answer_lengths)[0], input_ids.device)


def host_answers(
    input_ids: torch.Tensor, prompt_lengths: Lengths, answer_lengths: Lengths | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of the answers (b, l) bool, and their ends (b,), on the CPU.

    Raises:
        ValueError: see `answer_positions`.
    """
    b, width = input_ids.shape
    starts = _lengths("prompt_lengths", prompt_lengths, b)
    ends = np.full(b, width)
    if answer_lengths is not None:
        ends = starts + _lengths("answer_lengths", answer_lengths, b)
    is_bad = (starts < 0) | (ends <= starts) | (ends > width)
    if is_bad.any():
        row = int(is_bad.argmax())
        raise ValueError(
            f"row {row} of the batch: its answer would fill positions {starts[row]} to "
            f"{ends[row]} of {width}; an answer needs at least one token, and has to end "
            "within its row"
        )
    positions = np.arange(width)
    return (positions >= starts[:, None]) & (positions < ends[:, None]), ends


def answer_blocks(answer: np.ndarray, block_length: int) -> tuple[np.ndarray, int]:
    """Return the answer positions (b, n) bool in the blocks that hold answers, and their start.

    Blocks have B positions of the sequence, prompt included. Blocks without an answer are left out
    before the first and after the last block that has one in some row.
    """
    columns = answer.any(0).nonzero()[0]
    start = int(columns[0]) // block_length * block_length
    rest = -(int(columns[-1]) + 1) % block_length
    inside = answer[:, start : columns[-1] + 1]
    return np.pad(inside, ((0, 0), (0, rest))), start


def _lengths(name: str, lengths: Lengths, b: int) -> np.ndarray:
    numbers = np.asarray(host_list(lengths))
    if numbers.dtype.kind not in "iu" or numbers.shape != (b,):
        raise ValueError(f"{name} is {lengths!r}: pass a whole number for each of the {b} rows")
    return numbers


def host_list(values: Lengths) -> Sequence[int]:
    """Return `values` on the CPU."""
    return values.tolist() if isinstance(values, torch.Tensor) else values


def moved(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return `values` as a tensor on `device`, without waiting for the copy."""
    return torch.from_numpy(values).to(device, non_blocking=True)
