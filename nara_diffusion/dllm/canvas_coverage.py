"""Compare the canvas of generation with the part of it that training covers."""

from __future__ import annotations

from collections.abc import Sequence

from nara_diffusion.utils.data_order import ShuffledStream
from nara_diffusion.utils.wording import counted

from .batches import AnswerCollator

_SAMPLE = 1000  # samples of the training stream that `trained_canvas` reads


def trained_canvas(
    stream: ShuffledStream,
    collator: AnswerCollator,
    batch_size: int,
    gen_length: int,
    block_length: int,
) -> tuple[str, list[str]]:
    """Compare the canvas of generation with the part of it that training covers.

    Args:
        stream: the training stream. Only the first samples are read.
        batch_size: the number of samples of a forward.

    Returns:
        A line for the run's facts, and warnings. There is a warning if generation goes beyond the
        positions that training covers, or ends before the answers do.
    """
    rows = [stream[position] for position in range(min(len(stream.samples), _SAMPLE))]
    prompts = [row["prompt_length"] for row in rows]
    answers = [len(row["input_ids"]) - row["prompt_length"] for row in rows]
    trained: list[int] = []
    for first in range(0, len(rows), batch_size):
        trained += collator.answer_lengths(rows[first : first + batch_size])
    padding = f"(trained_padding {collator.trained_padding})"
    fact = (
        f"prompts {_span(prompts)}, answers {_span(answers)}, trained to {_span(trained)} tokens "
        f"{padding}; gen_length {gen_length} in {counted(gen_length // block_length, 'block')}"
    )
    short, long = [], []
    for row, answer, end in zip(rows, answers, trained, strict=True):
        is_whole = collator.is_whole(row)
        length = answer - is_whole  # without the end token
        if is_whole and end < gen_length and collator.multiple == 1:  # else it ends with a canvas
            short.append(end)
        if row["instruction"] and length > gen_length:  # a text without a prompt may be longer
            long.append(length)
    warnings = []
    samples = counted(len(rows), "sample")
    if short:
        warnings.append(
            f"gen_length is {gen_length}, and {len(short)} of {samples} end before that, the "
            f"shortest after {min(short)} tokens {padding}: what follows an answer there is not "
            "trained, and generated answers can become worse than the base model's while the "
            "validation loss falls; give --trained_padding gen_length"
        )
    if long:
        warnings.append(
            f"gen_length is {gen_length}, and {len(long)} of {samples} have longer answers, up to "
            f"{max(long)} tokens: a generated answer is cut there, and exact match counts it as "
            f"wrong; give --gen_length {max(long)}"
        )
    return fact, warnings


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"
