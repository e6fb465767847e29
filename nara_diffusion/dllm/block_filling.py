"""Sampling block by block, for models with attention by blocks (LLaDA2).

A block has B positions of the sequence, prompt included, so the first block may begin with the end
of a prompt. The blocks are filled one after another by the rules of `decoding`, under the block
mask of `nara_diffusion.noise.blocks`. A noise-aware model runs at

    λ (b, k) = 0 for the prompt and finished blocks, masked share of the answer in the active block

Finished text stays clean, so the keys and values that a layer computed for it at λ = 0 stay valid.
A cache is therefore exact, and a step computes only the B positions of its block. The first step of
a block also computes the previous block, which is clean by then, and adds it to the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from .decoding import GenerationStep, State
from .models.backbone import Backbone, conditioned
from .models.block_causal import CACHE


class BlockReader(Protocol):
    """A model that returns the logits of a block after clean text."""

    def logits(self, sequences: Tensor, block: int, level: Tensor) -> Tensor:
        """Return the logits (b, B, v) of a block of `sequences` (b, l) at λ = `level` (b,).

        All earlier blocks must be clean.
        """
        ...


class WholeText:
    """A `BlockReader` that computes all positions up to the block at each step.

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


class CachedText:
    """A `BlockReader` with a cache, which computes a block and the clean blocks not yet cached.

    The clean blocks run at λ = 0.

    Args:
        real: (b, l), 0 on padding.
    """

    def __init__(self, backbone: Backbone, real: Tensor, block_length: int) -> None:
        self.backbone, self.real, self.block_length = backbone, real, block_length
        self.cache: Any = DynamicCache()
        self.cached = 0  # blocks

    def logits(self, sequences: Tensor, block: int, level: Tensor) -> Tensor:
        start, end = self.cached * self.block_length, (block + 1) * self.block_length
        levels = F.pad(level[:, None], (block - self.cached, 0))  # (b, clean blocks + 1)
        places = torch.arange(start, end, device=sequences.device)[None]
        kwargs = {CACHE: self.cache, "use_cache": True, "position_ids": places}
        kwargs |= {"attention_mask": self.real[:, :end], "logits_to_keep": self.block_length}
        with conditioned(self.backbone.model, levels):
            output = self.backbone.model(sequences[:, start:end], **kwargs)
        self.cache.crop(-self.block_length)
        self.cached = block
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
    for block in range(first, last):
        if _fill_block(state, reader, block, block_length, on_step_end):
            break
    state.sequences = state.sequences[:, :width]


def _fill_block(
    state: State,
    reader: BlockReader,
    block: int,
    block_length: int,
    on_step_end: Callable[[GenerationStep], None] | None,
) -> bool:
    """Fill the masks of a block. Return True if generation is finished.

    It is finished if no row has a mask left, or `on_step_end` stops it. The host reads once per
    step which rows still have a mask.
    """
    b, width = state.sequences.shape
    device = state.sequences.device
    places = torch.arange(width, device=device).view(-1, block_length)[block]
    in_block = state.positions // block_length == block  # (b, g)
    size = in_block.sum(1).clamp(min=1)  # (b,)
    for step, count in enumerate(filter(None, state.sampling.tokens_per_step())):
        left = state.masked & in_block  # (b, g)
        rows = [row for row, is_open in enumerate(left.any(1).tolist()) if is_open]
        if not rows:  # at step 0, all answers may be finished, with no masks in later blocks
            return step == 0 and not state.masked.any()
        level = left.sum(1) / size  # (b,)
        logits = reader.logits(state.sequences, block, level)  # (b, B, v)
        state.forwards += 1
        masked = left.new_zeros(b, width).scatter(1, state.positions, left)[:, places]  # (b, B)
        index = torch.tensor(rows).to(device, non_blocking=True)  # (a,)
        positions = places.expand(len(rows), -1)
        state.place(rows, positions, masked[index], logits[index], count)
        state.finish_rows()
        if on_step_end is not None and state.is_stopped(on_step_end, level):
            return True
    return False
