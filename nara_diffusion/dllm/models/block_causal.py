"""LLaDA2: attention in both directions inside a block, and to earlier blocks.

The stock class has one mask for all of a text. This one has the same weights, and turns a padding
mask, or none, into the block mask of `nara_diffusion.noise.blocks`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import Glm4MoeForCausalLM, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from nara_diffusion.noise.blocks import attention_argument, block_mask

# Diffusers looks for this class beside those of a pipeline's component, to learn how they are
# loaded.
__all__ = ["LLaDA2ForCausalLM", "PreTrainedModel"]

CACHE = "cache" if "cache" in inspect.signature(Glm4MoeForCausalLM.forward).parameters else ""
CACHE = CACHE or "past_key_values"
"""What this version of transformers calls a forward's cache."""


class LLaDA2ForCausalLM(Glm4MoeForCausalLM):
    """Glm4Moe under the block mask of `config.block_length`; position i predicts token i."""

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Return True: transformers looks for its experts in the source of the class's module."""
        return True

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Return logits (b, q, v). Arguments are the stock class's.

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
