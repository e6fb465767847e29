"""The choice of tokens for masks, and of the predicted tokens that stay."""

from __future__ import annotations

import torch

_NEVER = float("-inf")


class RowRandom:
    """Uniform random numbers in [0, 1), from a stream of its own for each row."""

    def __init__(self, generator: torch.Generator | None, rows: int, device: torch.device) -> None:
        source = "cpu" if generator is None else generator.device
        seeds = torch.randint(2**62, (rows,), generator=generator, device=source)
        self.streams = [torch.Generator(device).manual_seed(seed) for seed in seeds.tolist()]

    def uniform(self, rows: torch.Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The next random numbers of `rows` (a,): (a, *shape)."""
        streams = [self.streams[row] for row in rows.tolist()]
        return torch.stack([torch.rand(shape, dtype=dtype, device=s.device, generator=s) for s in streams])


def sample_tokens(
    logits: torch.Tensor, temperature: float, random: RowRandom | None, rows: torch.Tensor
) -> torch.Tensor:
    """Tokens (a, k) of `rows` (a,) from logits (a, k, v): the argmax at temperature 0, else from softmax(logits / T).

    The draw is the argmax of logits / T + Gumbel noise, in float64: in lower precision the noise has too few values,
    and samples get visibly worse (arXiv 2409.02908).
    """
    if temperature == 0 or random is None:
        return logits.argmax(-1)
    uniform = random.uniform(rows, *logits.shape[1:], dtype=torch.float64)
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
