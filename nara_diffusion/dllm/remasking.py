"""Which token a mask becomes, and which of the predicted tokens stay."""

from __future__ import annotations

import torch

_NEVER = float("-inf")


def sample_tokens(logits: torch.Tensor, temperature: float, generator: torch.Generator | None) -> torch.Tensor:
    """Tokens (b, k) from logits (b, k, v): the argmax at temperature 0, a draw from softmax(logits / T) above.

    The draw is the argmax of logits / T + Gumbel noise, in float64: in lower precision the noise has too few
    values, and samples get visibly worse (arXiv 2409.02908).
    """
    if temperature == 0:
        return logits.argmax(-1)
    uniform = torch.rand(logits.shape, dtype=torch.float64, device=logits.device, generator=generator)
    gumbel = -torch.log(-torch.log(uniform.clamp(min=torch.finfo(torch.float64).tiny)))
    return (logits.double() / temperature + gumbel).argmax(-1)


def confidence_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """softmax(logits) at `tokens`: (b, k, v), (b, k) → (b, k), in float32 at least."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)).exp()


def highest(rank: torch.Tensor, masked: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` masked positions of each row that rank highest, all of them where there are fewer: (b, k) bool."""
    rank = rank.masked_fill(~masked, _NEVER)
    chosen = torch.zeros_like(masked)
    chosen.scatter_(1, rank.topk(min(count, rank.shape[1]), dim=1).indices, True)
    return chosen & masked


def above(confidence: torch.Tensor, masked: torch.Tensor, threshold: float) -> torch.Tensor:
    """Masked positions above `threshold`, and the highest of each row in any case: (b, k) bool."""
    return (masked & (confidence > threshold)) | highest(confidence, masked, 1)
