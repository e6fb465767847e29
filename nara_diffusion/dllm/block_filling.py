"""Sampling block by block, for models with attention by blocks (LLaDA2, SDAR, Fast-dLLM v2, …).

A block has B positions of the sequence, prompt included, so the first block may begin with the end
of a prompt. The blocks are filled one after another by the rules of `decoding`, under the block
mask of `nara_diffusion.noise.blocks`. A noise-aware model runs at

    λ (b, k) = 0 for the prompt and finished blocks, masked share of the answer in the active block

Finished text stays clean, so the keys and values that a layer computed for it at λ = 0 stay valid.
A cache is therefore exact, and a step computes only the B positions of its block. The first step of
a block also computes the previous block, which is clean by then, and adds it to the cache. If
the model predicts the next token (Fast-dLLM v2), that step also gives the logits of the block's
first token, and the block's later steps use them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from .decoding import Sampling
from .masked_sampler import Generation, GenerationStep, State, WholeText
from .models.backbone import Backbone
from .models.forward_rows import conditioned
from .models.model_classes import CACHE


class BlockText(WholeText):
    """Read a text up to its active block. λ is the masked share of the answer in that block.

    Args:
        real: (b, l), 0 on padding; l is a multiple of B.
        block_length: B.
        use_cache: False to compute all clean blocks again at each step.
    """

    def __init__(self, real: Tensor, block_length: int, use_cache: bool) -> None:
        self.real, self.block_length = real, block_length
        self.cache: Any = DynamicCache() if use_cache else None
        self.start = self.cached = 0  # positions before the active block, and cached ones
        self.first_logits: Any = None  # (b, 1, v) of the active block's first token

    def blocks(self, state: State) -> Iterator[Tensor]:
        b, width = self.real.shape
        places = torch.arange(width, device=self.real.device).expand(b, -1)
        first = int(state.starts.min()) // self.block_length * self.block_length
        for start in range(first, width, self.block_length):
            self.start = start
            yield places[:, self.start : self.start + self.block_length]

    def level(self, state: State, positions: Tensor) -> Tensor:
        size = state.are_answers(positions).sum(1).clamp(min=1)
        return state.masked_at(positions).sum(1).float() / size

    def logits(self, state: State, rows: Tensor, positions: Tensor, level: Tensor) -> Tensor:
        end = self.start + self.block_length
        clean = (self.start - self.cached) // self.block_length  # blocks
        kwargs = {
            CACHE: self.cache,
            "use_cache": self.cache is not None,
            "position_ids": torch.arange(self.cached, end, device=rows.device)[None],
            "attention_mask": self.real[:, :end],
            "logits_to_keep": self.block_length,
        }
        with conditioned(state.backbone.model, F.pad(level[:, None], (clean, 0))):
            output = state.backbone.model(state.sequences[:, self.cached : end], **kwargs)
        if self.cache is not None:
            self.cache.crop(-self.block_length)
            self.cached = self.start
        logits = output.logits
        if state.backbone.is_shifted and clean:
            self.first_logits = logits[:, :1]
        elif state.backbone.is_shifted and self.start:
            logits = torch.cat([self.first_logits, logits[:, 1:]], dim=1)
        return logits[rows]


def fill_blocks(
    backbone: Backbone,
    sampling: Sampling,
    *,
    use_cache: bool | None,
    on_step_end: Callable[[GenerationStep], None] | None,
    **texts: Any,
) -> Generation:
    """Answer prompts, block by block; see `generate`. `texts` are arguments of `State`."""
    state = State(backbone, sampling, **texts)
    width = state.sequences.shape[1]
    to_whole_blocks = (0, -width % sampling.block)
    real = state.attention_mask
    real = torch.ones_like(state.sequences) if real is None else real
    state.sequences = F.pad(state.sequences, to_whole_blocks)
    reader = BlockText(F.pad(real, to_whole_blocks), sampling.block, use_cache is not False)
    state.fill(reader, on_step_end)
    state.sequences = state.sequences[:, :width]
    return state.generation()
