"""The divergence of an adapted language model from its base, KL(p₀ ‖ p) at masked positions, in nats.

    Σ_v p₀(v) · (log p₀(v) − log p(v)),   p the model's distribution over the vocabulary, p₀ its base's

It is the cross-entropy against what the base says in place of the clean token, less the base's own entropy, and so
counts in the same unit as the objective; distillation uses it. A squared error of logits would also hold what no
prediction depends on: a number added to all logits of a token.

Of the base only the hidden states before the output head are kept; its logits, as the model's own, are made chunk by
chunk (`nara_diffusion.dllm.models.lm_head`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nara_diffusion.dllm.models.lm_head import HeadLoss, hidden_states_in_head
from nara_diffusion.training.base_hold import as_base


def divergence(base_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(p₀ ‖ p) of logits (…, v), in float32 at least: (…)."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_p0, log_p = (F.log_softmax(values.to(dtype), -1) for values in (base_logits, logits))
    return F.kl_div(log_p, log_p0, reduction="none", log_target=True).sum(-1)


def divergence_loss(base_hidden: Tensor, masked: Tensor) -> HeadLoss:
    """The head's loss KL(p₀ ‖ p) where `masked` (b, l); `base_hidden` (b, l, d) is the input of the base's head."""

    def loss(head: nn.Module, hidden: Tensor, base_hidden: Tensor) -> Tensor:
        with as_base(head):
            base_logits = head.forward(base_hidden)
        return divergence(base_logits, head.forward(hidden))

    return HeadLoss(masked, (base_hidden,), loss)


def base_hidden_states(model: nn.Module, head: nn.Module, input_ids: Tensor, **padding: Tensor) -> Tensor:
    """The input (b, l, d) of the head of `model`, with adapters disabled, for `input_ids` (b, l)."""
    with as_base(model), hidden_states_in_head(model, head, *input_ids.shape) as states:
        model(input_ids, **padding)
    return states.pop()
