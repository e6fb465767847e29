"""Attention by blocks: in both directions inside a block, and to earlier blocks.

Stock classes have one mask for all of a text. These have the same weights, and turn a padding
mask, or none, into the block mask of `nara_diffusion.noise.blocks`:

| checkpoint              | class                       |
|-------------------------|-----------------------------|
| LLaDA2                  | LLaDA2ForCausalLM           |
| SDAR, TraDo, A2D-Qwen3  | BlockQwen3ForCausalLM       |
| SDAR, Qwen3-MoE         | BlockQwen3MoeForCausalLM    |
| A2D-Qwen2               | BlockQwen2ForCausalLM       |
| Fast-dLLM v2            | ShiftedBlockQwen2ForCausalLM|

Fast-dLLM v2 was trained to predict the next token. The first token of a block is predicted by the
last position of the block before it.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Glm4MoeForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
)

from nara_diffusion.noise.blocks import attention_argument, block_mask

from .shifted_logits import ShiftedQwen2ForCausalLM

# Diffusers looks for these classes beside those of a pipeline's component, to learn how they are
# loaded.
__all__ = [
    "BlockQwen2ForCausalLM",
    "BlockQwen3ForCausalLM",
    "BlockQwen3MoeForCausalLM",
    "LLaDA2ForCausalLM",
    "PreTrainedModel",
    "ShiftedBlockQwen2ForCausalLM",
]

CACHE = "cache" if "cache" in inspect.signature(Glm4MoeForCausalLM.forward).parameters else ""
CACHE = CACHE or "past_key_values"
"""What this version of transformers calls a forward's cache."""


class BlockCausalLM(PreTrainedModel):
    """The forward of a stock class, which comes next in the order of bases, under a block mask.

    The blocks have `config.block_length` positions.
    """

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return logits (b, q, v); position i predicts token i. Arguments are the stock class's.

        Args:
            input_ids: (b, q), whole blocks of tokens; with a cache, those after the cached ones.
            attention_mask: (b, l), False on padding, for the cached tokens too; or a mask
                (b, 1, q, l), bool or what the attention function takes.

        Raises:
            ValueError: `labels` were given, or the attention function takes no block mask.
        """
        if kwargs.get("labels") is not None:
            raise ValueError(
                "this model doesn't take labels: use nara_diffusion.dllm.masked_diffusion_loss"
            )
        if attention_mask is None or attention_mask.dim() == 2:
            tokens: Any = kwargs.get("inputs_embeds") if input_ids is None else input_ids
            cache = kwargs.get(CACHE)
            b, queries = tokens.shape[:2]
            length = queries + (0 if cache is None else cache.get_seq_length())
            if attention_mask is None:
                attention_mask = torch.ones(b, length, dtype=torch.bool, device=tokens.device)
            attention_mask = block_mask(attention_mask, self.config.block_length, queries)
        if attention_mask.dtype == torch.bool:
            attention = self.config._attn_implementation
            attention_mask = attention_argument(attention_mask, attention, self.dtype)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **kwargs,
        )


class BlockMixtureLM(BlockCausalLM):
    """A mixture of experts."""

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Return True: transformers looks for its experts in the source of the class's module."""
        return True


class LLaDA2ForCausalLM(BlockMixtureLM, Glm4MoeForCausalLM):
    """LLaDA2, a Glm4Moe."""


class BlockQwen3MoeForCausalLM(BlockMixtureLM, Qwen3MoeForCausalLM):
    """SDAR with experts."""


class BlockQwen3ForCausalLM(BlockCausalLM, Qwen3ForCausalLM):
    """SDAR, TraDo and dLLM's A2D of Qwen3."""


class BlockQwen2ForCausalLM(BlockCausalLM, Qwen2ForCausalLM):
    """dLLM's A2D of Qwen2."""


class ShiftedBlockQwen2ForCausalLM(BlockCausalLM, ShiftedQwen2ForCausalLM):
    """Fast-dLLM v2.

    In training, [noisy | clean] blocks stand in one row. As in sampling, the first token of a block
    is predicted by the clean block before it.
    """

    def places_before(self, hidden: Tensor, position_ids: Tensor | None) -> Tensor:
        places = super().places_before(hidden, position_ids)
        if position_ids is None or len(position_ids) != 1:
            return places
        positions = position_ids[0]
        first_clean = len(positions) - 1 - positions[-1]  # the clean half begins at position 0
        is_start = (positions % self.config.block_length == 0) & (positions > 0)
        return torch.where(is_start, first_clean + positions - 1, places).clamp(min=0)
