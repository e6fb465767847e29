"""Dream: trained to predict the next token, and read so that position i predicts token i.

The output head works position by position. So shifting the hidden states before it is the same as
shifting the logits after it, and costs less:

    head(cat(h[:, :1], h[:, :-1])) = cat(logits[:, :1], logits[:, :-1])

Nothing predicts the first token of a sequence: position 0 has the distribution of token 1. So no
answer may begin there: a prompt begins with a BOS token, as in Dream's own evaluation.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, Qwen2ForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

# Diffusers looks for this class beside those of a pipeline's component, to learn how they are
# loaded.
__all__ = ["PreTrainedModel", "ShiftedQwen2ForCausalLM"]


class ShiftedQwen2ForCausalLM(Qwen2ForCausalLM):
    """Qwen2 with the same weights, and the logits moved by one position."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
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

    def places_before(
        self, hidden: torch.Tensor, position_ids: torch.Tensor | None
    ) -> torch.Tensor:
        """Return, for each place of `hidden` (b, l, d), the place (l,) of the position before it."""
        return torch.arange(hidden.shape[1], device=hidden.device).sub(1).clamp(min=0)
