"""Sampling block by block, for models with attention by blocks (LLaDA2).

Blocks have B positions of the sequence, prompt included, so the first one may begin with the end of
a prompt. One block after another is filled by the rules of `decoding`, under the block mask of
`nara_diffusion.noise.blocks`. A noise-aware model runs at

    λ (b, k) = 0 for the prompt and finished blocks, masked share of the answer in the active block

Finished text is clean for ever: keys and values that a layer computed at λ = 0 stay right. So a
cache of them is exact, and a step computes the B positions of its block only. It takes one forward
of each finished block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from .canvas import conditioned
from .models.backbone import Backbone
from .models.block_causal import CACHE
from .unmasking import GenerationStep, State


class BlockReader(Protocol):
    """What filling blocks needs from a model: the logits of a block behind clean text."""

    def logits(self, sequences: Tensor, block: int, level: Tensor) -> Tensor:
        """Return logits (b, B, v) of a block of `sequences` (b, l) at λ = `level` (b,)."""
        ...

    def finish(self, sequences: Tensor, blocks: int) -> None:
        """Take note that the first `blocks` blocks of `sequences` (b, l) are clean."""
        ...


class WholeText:
    """Compute all positions up to the block at each step.

    Args:
        real: (b, l), 0 on padding.
    """

    def __init__(self, backbone: Backbone, real: Tensor, block_length: int) -> None:
        self.backbone, self.real, self.block_length = backbone, real, block_length

    def logits(self, sequences: Tensor, block: int, level: Tensor) -> Tensor:
        start, end = block * self.block_length, (block + 1) * self.block_length
        levels = F.pad(level[:, None], (block, 0))  # (b, block + 1)
        at = torch.arange(start, end, device=sequences.device).expand(len(sequences), -1)
        with conditioned(self.backbone.model, levels):
            return self.backbone.logits(sequences[:, :end], self.real[:, :end], at=at)

    def finish(self, sequences: Tensor, blocks: int) -> None:
        pass


class CachedText:
    """Compute the block at each step, and each finished block once, at λ = 0.

    Args:
        real: (b, l), 0 on padding.
    """

    def __init__(self, backbone: Backbone, real: Tensor, block_length: int) -> None:
        self.backbone, self.real, self.block_length = backbone, real, block_length
        self.cache: Any = DynamicCache()
        self.finished = 0  # positions

    def logits(self, sequences: Tensor, block: int, level: Tensor) -> Tensor:
        logits = self._forward(sequences, (block + 1) * self.block_length, level)
        self.cache.crop(-self.block_length)
        return logits

    def finish(self, sequences: Tensor, blocks: int) -> None:
        end = blocks * self.block_length
        if end > self.finished:
            clean = torch.zeros(len(sequences), device=sequences.device)
            self._forward(sequences, end, clean, logits_to_keep=1)
            self.finished = end

    def _forward(self, sequences: Tensor, end: int, level: Tensor, **kwargs: Any) -> Tensor:
        tokens = sequences[:, self.finished : end]
        places = torch.arange(self.finished, end, device=tokens.device)[None]
        kwargs |= {CACHE: self.cache, "use_cache": True, "position_ids": places}
        with conditioned(self.backbone.model, level):
            output = self.backbone.model(tokens, attention_mask=self.real[:, :end], **kwargs)
        return output.logits


def fill_blocks(
    state: State, on_step_end: Callable[[GenerationStep], None] | None, use_cache: bool
) -> None:
    """Fill all masks of `state`, block by block."""
    block_length = state.backbone.block_length
    assert block_length is not None
    width = state.sequences.shape[1]
    rest = (0, -width % block_length)
    state.sequences = F.pad(state.sequences, rest)
    kind = CachedText if use_cache else WholeText
    real = state.attention_mask
    real = torch.ones_like(state.sequences[:, :width]) if real is None else real
    reader = kind(state.backbone, F.pad(real, rest), block_length)
    first = int(state.starts.min()) // block_length
    last = (width + rest[1]) // block_length
    reader.finish(state.sequences, first)
    for block in range(first, last):
        if _fill_block(state, reader, block, block_length, on_step_end):
            break
        if not state.masked.any():
            break
        reader.finish(state.sequences, block + 1)
    state.sequences = state.sequences[:, :width]


def _fill_block(
    state: State,
    reader: BlockReader,
    block: int,
    block_length: int,
    on_step_end: Callable[[GenerationStep], None] | None,
) -> bool:
    """Fill the masks of a block; return True if `on_step_end` stops."""
    b, width = state.sequences.shape
    places = torch.arange(width, device=state.sequences.device).view(-1, block_length)[block]
    in_block = state.positions // block_length == block  # (b, g)
    size = in_block.sum(1).clamp(min=1)  # (b,)
    for count in state.sampling.tokens_per_step():
        left = state.masked & in_block  # (b, g)
        if not left.any():
            return False
        if count == 0:
            continue
        level = left.sum(1) / size  # (b,)
        logits = reader.logits(state.sequences, block, level)  # (b, B, v)
        state.forwards += 1
        masked = left.new_zeros(b, width).scatter(1, state.positions, left)[:, places]  # (b, B)
        is_open = masked.any(1).tolist()
        rows = [row for row, is_one in enumerate(is_open) if is_one]
        positions = places.expand(len(rows), -1)
        state.place(rows, positions, masked[rows], logits[rows], count)
        state.finish_rows()
        if on_step_end is not None and state.is_stopped(on_step_end, level):
            return True
    return False
