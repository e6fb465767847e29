"""Sampling LLaDA and Dream with Fast-dLLM's approximate caches (arXiv 2505.22618).

The first step of a block computes the whole text. The block's later steps compute a part of it, and
attend to the keys and values of the first step everywhere else:

    cache     computed at later steps
    prefix    the block and all later blocks
    dual      the block

Each step runs at its λ, as without a cache. So keys and values that aren't computed again stay at
the λ of the block's first step. In a model that sees the whole text, they would change with each
token and with λ; a cache is therefore not exact.

If the model predicts the next token (Dream), the position before the block is computed with it,
since it predicts the block's first token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from nara_diffusion.noise.blocks import attention_argument

from .decoding import Sampling
from .masked_sampler import State, WholeText
from .models.backbone import Backbone
from .models.forward_rows import conditioned
from .models.model_classes import CACHE


class TextCache(DynamicCache):
    """The keys and values of texts. Forwards after the first one replace a part of them.

    Attributes:
        rows: (a,) the indices of the texts in the batch.
        positions: (a, q) of the tokens of the next forward; None for all.
        states: the keys and values of each layer, both (a, h, l, d).
    """

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows
        self.positions: Tensor | None = None
        self.states: list[tuple[Tensor, Tensor]] = []

    def replace(self, rows: Tensor, positions: Tensor) -> None:
        """Prepare a forward of `positions` (a', q) in some of the rows, and drop the other rows."""
        if len(rows) < len(self.rows):
            index = torch.searchsorted(self.rows, rows)
            self.states = [(keys[index], values[index]) for keys, values in self.states]
        self.rows, self.positions = rows, positions

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the states (a, h, q, d) of a layer's forward; return those of the whole texts."""
        if self.positions is None:
            self.states.append((key_states, value_states))
        else:
            keys, values = self.states[layer_idx]
            places = self.positions[:, None, :, None].to(keys.device)  # (a, 1, q, 1)
            keys.scatter_(2, places.expand_as(key_states), key_states)
            values.scatter_(2, places.expand_as(value_states), value_states)
        return self.states[layer_idx]


class CachedText(WholeText):
    """Read a text with a cache. λ is the masked share of the answer.

    Raises:
        ValueError: the sampling has no blocks, or the model can't have a cache.
    """

    def __init__(self, backbone: Backbone, sampling: Sampling) -> None:
        model = backbone.language_model
        kind = type(backbone.model if model is None else model).__name__
        problems = {
            "tokens are placed in any order without blocks: give block_length, or leave cache out": (
                sampling.block_length is None
            ),
            "the adapter puts virtual tokens before a text: leave cache out": backbone.virtual_tokens,
            f"{kind} keeps no keys and values: leave cache out": (
                model is None or not model.can_generate()
            ),
        }
        for problem, is_present in problems.items():
            if is_present:
                raise ValueError(f"cache is {sampling.cache!r}, but {problem}.")
        self.keeps_suffix = sampling.cache == "dual"
        self.cache: TextCache | None = None  # from the second step of a block on
        self.start = 0  # of the block in the answer

    def blocks(self, state: State) -> Iterator[Tensor]:
        for number, positions in enumerate(super().blocks(state)):
            self.start = number * state.sampling.block
            self.cache = None
            yield positions

    def logits(self, state: State, rows: Tensor, positions: Tensor, level: Tensor) -> Tensor:
        sequences, at = state.sequences[rows], positions[rows]
        mask = None if state.attention_mask is None else state.attention_mask[rows]
        inputs = {}
        if self.cache is None:
            self.cache = TextCache(rows)
        else:
            size = at.shape[1] if self.keeps_suffix else state.sampling.gen_length - self.start
            offsets = torch.arange(-state.backbone.is_shifted, size, device=at.device)
            computed = at[:, :1] + offsets  # (a, q)
            self.cache.replace(rows, computed)
            sequences, at = sequences.gather(1, computed), at - computed[:, :1]
            inputs["position_ids"] = computed
            if mask is not None:
                attention = state.backbone.configured("_attn_implementation")
                dtype = self.cache.states[0][0].dtype
                mask = attention_argument(mask.bool()[:, None, None], attention, dtype)
        inputs[CACHE] = self.cache
        with conditioned(state.backbone.model, level[rows]):
            return state.backbone.logits(sequences, mask, at=at, **inputs)
