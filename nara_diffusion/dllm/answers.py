"""Where the answers of a batch are: positions (b, l) bool, from lengths (b,).

A row is prompt, answer, padding. Lengths are checked on the CPU, before anything is moved.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

Lengths = torch.Tensor | Sequence[int]
"""Of lengths, indices and λ the host needs the values. Those of a tensor on another device than the
CPU are copied, and that waits for the device: pass lists, or tensors on the CPU."""


def answer_positions(
    input_ids: torch.Tensor,
    prompt_lengths: Lengths,
    *,
    answer_lengths: Lengths | None = None,
) -> torch.Tensor:
    """Return the positions of the answers: (b, l) bool.

    Raises:
        ValueError: lengths that are not one whole number a row; an answer that is empty or longer
            than its row.
    """
    return moved(host_answers(input_ids, prompt_lengths, answer_lengths)[0], input_ids.device)


def host_answers(
    input_ids: torch.Tensor, prompt_lengths: Lengths, answer_lengths: Lengths | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of the answers (b, l) bool, and their ends (b,), on the CPU.

    Raises:
        ValueError: as `answer_positions`.
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
            f"row {row} of the batch: its answer would take positions {starts[row]} to "
            f"{ends[row]} of {width}; an answer needs at least one token, and has to end "
            "within its row"
        )
    positions = np.arange(width)
    return (positions >= starts[:, None]) & (positions < ends[:, None]), ends


def active_blocks(
    answer: np.ndarray, draws: np.ndarray, block_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the block of one token of each answer: (b, l') bool, and its end (b,).

    Blocks have B positions of the sequence, prompt included; l' is the end of the last one.

    Args:
        answer: (b, l) bool.
        draws: (b,) in [0, 1), the token's place in its answer.
        block_length: B.
    """
    token = (draws * answer.sum(1)).astype(np.int64)  # (b,)
    place = (answer.cumsum(1) <= token[:, None]).sum(1)  # of the sequence
    block = place // block_length
    width = int(block.max() + 1) * block_length
    whole = np.zeros((len(answer), width), dtype=bool)
    cut = answer[:, :width]
    whole[:, : cut.shape[1]] = cut
    active = whole & (np.arange(width) // block_length == block[:, None])
    ends = width - active[:, ::-1].argmax(1)
    return active, ends


def _lengths(name: str, lengths: Lengths, b: int) -> np.ndarray:
    found = np.asarray(host_list(lengths))
    if found.dtype.kind not in "iu" or found.shape != (b,):
        raise ValueError(f"{name} is {lengths!r}: pass a whole number for each of the {b} rows")
    return found


def host_list(values: Lengths) -> Sequence[int]:
    """Return `values` on the CPU."""
    return values.tolist() if isinstance(values, torch.Tensor) else values


def until_end(answer: torch.Tensor) -> torch.Tensor:
    """Return the positions (b, l) bool up to the end of each answer (b, l)."""
    return answer.flip(1).cumsum(1).flip(1) > 0


def moved(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return `values` as a tensor on `device`; the host doesn't wait for it."""
    return torch.from_numpy(values).to(device, non_blocking=True)
