"""The classes of models that transformers lacks, and what each class of models fixes.

*Dream* was trained to predict the next token, and is read so that position i predicts token i. The
output head works position by position. So shifting the hidden states before it is the same as
shifting the logits after it, and costs less:

    head(cat(h[:, :1], h[:, :-1])) = cat(logits[:, :1], logits[:, :-1])

Nothing predicts the first token of a sequence: position 0 has the distribution of token 1. So no
answer may begin there: a prompt begins with a BOS token, as in Dream's own evaluation.

*Attention by blocks* goes in both directions inside a block, and to earlier blocks. Stock classes
have one mask for all of a text. These have the same weights, and turn a padding mask, or none, into
the block mask of `nara_diffusion.noise.blocks`:

| checkpoint              | class                       |
|-------------------------|-----------------------------|
| LLaDA2                  | LLaDA2ForCausalLM           |
| SDAR, TraDo, A2D-Qwen3  | BlockQwen3ForCausalLM       |
| SDAR, Qwen3-MoE         | BlockQwen3MoeForCausalLM    |
| A2D-Qwen2               | BlockQwen2ForCausalLM       |
| Fast-dLLM v2            | ShiftedBlockQwen2ForCausalLM|

Fast-dLLM v2 was trained to predict the next token. The first token of a block is predicted by the
last position of the block before it.

`ModelTraits` are the facts about a class: its masks, its blocks, and its definition of λ.
`dllm/kinds` has the training and the sampling of each.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    DiffusionGemmaForBlockDiffusion,
    Glm4MoeForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from nara_diffusion.noise.blocks import attention_argument, block_mask
from nara_diffusion.noise.sources import BLOCK_SHARE, CORRUPTED_SHARE, MASKED_SHARE

# Diffusers looks for these classes beside those of a pipeline's component, to learn how they are
# loaded.
__all__ = [
    "BlockQwen2ForCausalLM",
    "BlockQwen3ForCausalLM",
    "BlockQwen3MoeForCausalLM",
    "LLaDA2ForCausalLM",
    "PreTrainedModel",
    "ShiftedBlockQwen2ForCausalLM",
    "ShiftedQwen2ForCausalLM",
]

_HAS_CACHE = "cache" in inspect.signature(Glm4MoeForCausalLM.forward).parameters
CACHE = "cache" if _HAS_CACHE else "past_key_values"
"""What this version of transformers calls a forward's cache."""


class ShiftedQwen2ForCausalLM(Qwen2ForCausalLM):
    """Qwen2 with the same weights, and the logits moved by one position."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits (b, l, v), or the last `logits_to_keep` ones; position i predicts token i.

        It makes no loss of labels.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        hidden = outputs.last_hidden_state  # (b, l, d)
        shifted = hidden[:, self.places_before(hidden, position_ids)]
        return CausalLMOutputWithPast(
            logits=self.lm_head(shifted[:, -logits_to_keep:]),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def places_before(self, hidden: Tensor, position_ids: Tensor | None) -> Tensor:
        """Return, for each place of `hidden` (b, l, d), the place (l,) of the position before it."""
        return torch.arange(hidden.shape[1], device=hidden.device).sub(1).clamp(min=0)


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


@dataclass(frozen=True)
class ModelTraits:
    """The facts about the models of one class.

    Attributes:
        title: the name of these models in messages.
        model_class: their class; a subclass counts too.
        noise_convention: the name of λ's definition in training and sampling.
        noise_level_per: whether they have one λ for each sample, or for each block of a sample.
        block_field: the field of their configuration with the length of the blocks that generation
            goes by; "" if they have none.
        has_masks: False if random tokens take the place of masks.
        attends_by_blocks: True if a position sees its own block and earlier ones; False if it sees
            the whole text.
    """

    title: str
    model_class: type[nn.Module]
    noise_convention: str = MASKED_SHARE
    noise_level_per: Literal["sample", "part"] = "sample"
    block_field: str = ""
    has_masks: bool = True
    attends_by_blocks: bool = False


CANVAS_MODEL = ModelTraits(
    "DiffusionGemma",
    DiffusionGemmaForBlockDiffusion,
    noise_convention=CORRUPTED_SHARE,
    block_field="canvas_length",
    has_masks=False,
)
BLOCK_MODEL = ModelTraits(
    "a model with attention by blocks",
    BlockCausalLM,
    noise_convention=BLOCK_SHARE,
    noise_level_per="part",
    block_field="block_length",
    attends_by_blocks=True,
)
MASKED_MODEL = ModelTraits("a masked language model", nn.Module)


def traits_of(model: nn.Module | None) -> ModelTraits:
    """Return the facts about a language model; those of a masked one for any other model."""
    for traits in (CANVAS_MODEL, BLOCK_MODEL):
        if isinstance(model, traits.model_class):
            return traits
    return MASKED_MODEL
