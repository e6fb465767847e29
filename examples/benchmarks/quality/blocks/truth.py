"""The true corruption of a canvas while `generate` fills it, in place of the sampler's λ, which no user can know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DiffusionGemmaForBlockDiffusion, PreTrainedTokenizerBase

from nara_diffusion.dllm.models.forward_rows import conditioned
from quality.blocks.controls import Controlled
from quality.blocks.tasks import CanvasRows


@contextmanager
def true_levels(
    tuned: Controlled, inner: DiffusionGemmaForBlockDiffusion, rows: CanvasRows, tokenizer: PreTrainedTokenizerBase
) -> Iterator[None]:
    """Inside, λ of a call is the share of positions whose token isn't the answer's, but for the case of letters.

    Args:
        rows: all are generated in one batch, the shortest prompts first.
    """
    order = sorted(range(len(rows)), key=lambda row: rows.rows[row]["prompt_length"])
    places = rows.prompt_lengths[:, None] + torch.arange(rows.canvas)
    folded = folding(tokenizer)
    answers = folded[rows.input_ids.gather(1, places)][order]  # (n, c)
    forward = inner.forward

    def told(*args: Any, **kwargs: Any) -> Any:
        level = wrong_share(folded[kwargs["decoder_input_ids"]], answers)
        tuned.at(level)
        with conditioned(tuned.model, level):
            return forward(*args, **kwargs)

    inner.forward = told  # type: ignore[method-assign]
    try:
        yield
    finally:
        inner.forward = forward  # type: ignore[method-assign]
        tuned.at(None)


def wrong_share(canvas: Tensor, answers: Tensor) -> Tensor:
    """The share (b,) of positions in `canvas` (b, c) that differ from `answers`."""
    return (canvas != answers).float().mean(1)


def folding(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """For each token of the vocabulary, that of the small letter if it is a capital one, else itself."""
    same = torch.arange(len(tokenizer))
    for token, index in tokenizer.get_vocab().items():
        if len(token) == 1 and token.isascii() and token.isupper():
            same[index] = tokenizer.convert_tokens_to_ids(token.lower())
    return same
