"""The settings of `generate`, and the rules by which a step places tokens.

A step predicts a token x for each mask of a block, ranks the masks by a score, and places the n best of each row:

    remasking         score
    low_confidence    p(x), p = softmax(logits)                                          LLaDA's
    random            a uniform random number                                            LLaDA's
    maskgit_plus      q(x), q = softmax(logits / T) within top_p                         Dream's `alg`
    topk_margin       q of the likeliest token − q of the second                         Dream's `alg`
    entropy           − H(q)                                                             Dream's `alg`

    rule                   n, 1 or more
    steps                  the block's tokens, spread evenly over its steps
    confidence_threshold   the number of scores above it                                 arXiv 2505.22618
    factor                 the largest n with (n + 1)(1 − n-th best score) < factor      arXiv 2505.22618
    entropy_bound          the largest n with H₁ + … + Hₙ − max(H₁, …, Hₙ) ≤ it          arXiv 2505.24857, EB-Sampler

H₁, H₂, … are the entropies of q, in nats, in the order of the scores. All but `steps` place several tokens where the
model is sure of them (parallel decoding).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from .models.backbone import Backbone

REMASKING = ("low_confidence", "random", "maskgit_plus", "topk_margin", "entropy")
CHAT_BLOCK_LENGTHS = {"llama": 32}
"""{model_type: the block length of the model's own chat}: LLaDA's. Dream's has one block."""
_PARALLEL = ("confidence_threshold", "factor", "entropy_bound")
_LAST = -1e9  # below every score


@dataclass(frozen=True)
class Sampling:
    """The settings of `generate`.

    Attributes:
        gen_length: the number of tokens of each answer.
        steps: the number of forwards; default: one for each token.
        block_length: the number of tokens of a block; default: gen_length.
        temperature: T; 0 is greedy.
        top_p: draw from the likeliest tokens alone that together have this probability; default: from all.
        cfg_scale: w, the scale of classifier-free guidance; 0 turns it off.
        remasking: the score, see above.
        confidence_threshold, factor, entropy_bound: one of the rules above, instead of `steps`.
        logits_eos_inf: never predict the end token of the model's configuration, so that an answer ends by another one
            or is filled, as in LLaDA's code.
        confidence_eos_eot_inf: place end tokens after all others, as in LLaDA's code.

    Raises:
        ValueError: a value is out of its range, or two settings contradict each other.
    """

    gen_length: int = 128
    steps: int | None = None
    block_length: int | None = None
    temperature: float = 0.0
    top_p: float | None = None
    cfg_scale: float = 0.0
    remasking: str = "low_confidence"
    confidence_threshold: float | None = None
    factor: float | None = None
    entropy_bound: float | None = None
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False

    def __post_init__(self) -> None:
        if self.block < 1 or self.gen_length < 1 or self.gen_length % self.block:
            raise ValueError(
                f"block_length {self.block} doesn't divide gen_length {self.gen_length}, as it has to"
            )
        blocks = self.gen_length // self.block
        if self.steps is not None and (self.steps < blocks or self.steps % blocks):
            raise ValueError(
                f"steps is {self.steps} and there are {blocks} blocks: pass a multiple of {blocks}, e.g. {blocks} or "
                f"{self.gen_length}"
            )
        for name in ("temperature", "cfg_scale"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, expected more than 0 and 1 at most")
        if self.remasking not in REMASKING:
            raise ValueError(
                f"remasking is {self.remasking!r}, expected one of {', '.join(map(repr, REMASKING))}"
            )
        rules = [name for name in ("steps", *_PARALLEL) if getattr(self, name) is not None]
        if len(rules) > 1:
            raise ValueError(
                f"{' and '.join(rules)} each say how many tokens a step places: give one of them"
            )
        orders = REMASKING if rules in ([], ["steps"]) else ("low_confidence", "maskgit_plus")
        orders = (*orders, "topk_margin", "entropy") if rules == ["entropy_bound"] else orders
        if self.remasking not in orders:
            raise ValueError(
                f"{rules[0]} goes with remasking {' or '.join(orders)}, and it is {self.remasking!r}"
            )

    @property
    def block(self) -> int:
        """The number of tokens of a block."""
        return self.gen_length if self.block_length is None else self.block_length

    def changed(self) -> dict[str, Any]:
        """gen_length, and the settings that aren't the defaults."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: value
            for name, value in values.items()
            if name == "gen_length" or value != getattr(Sampling, name)
        }

    def tokens_per_step(self) -> list[int]:
        """The number of tokens that each step of a block places by `steps`; ones for the other rules."""
        steps = (self.steps or self.gen_length) // (self.gen_length // self.block)
        whole, rest = divmod(self.block, steps)
        return [whole + (step < rest) for step in range(steps)]

    def place(
        self,
        logits: torch.Tensor,
        masked: torch.Tensor,
        count: int,
        last: torch.Tensor,
        uniform: Callable[..., torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict a token for each place of a block, and choose the places that get theirs.

        Args:
            logits: (a, k, v).
            masked: (a, k) bool, the places to choose from.
            count: how many a row, where `steps` rules.
            last: (e,) the tokens that are placed after all others.
            uniform: returns random numbers in [0, 1): f(*shape of a row, dtype=…) -> (a, *shape).

        Returns:
            Tokens (a, k), and which of the places get theirs (a, k) bool.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        shaped = self._shaped(logits)
        tokens = shaped.argmax(-1)
        if self.temperature > 0:
            # The Gumbel noise is float64: in lower precision it has too few values, and samples get visibly worse
            # (arXiv 2409.02908).
            draws = uniform(*logits.shape[1:], dtype=torch.float64).clamp(
                min=torch.finfo(torch.float64).tiny
            )
            tokens = (shaped.double() - torch.log(-torch.log(draws))).argmax(-1)
        if len(last):
            logits = logits.index_fill(-1, last, float("-inf"))
            shaped = self._shaped(logits)
        random = self.remasking == "random"
        score = (
            uniform(masked.shape[1], dtype=logits.dtype)
            if random
            else self._score(logits, shaped, tokens)
        )
        score = score.masked_fill(torch.isin(tokens, last), _LAST).masked_fill(
            ~masked, float("-inf")
        )
        score, order = score.sort(dim=1, descending=True, stable=True)
        n = torch.arange(1, masked.shape[1] + 1, device=score.device)
        if self.confidence_threshold is not None:
            keep = score > self.confidence_threshold
        elif self.factor is not None:
            keep = (n + 1) * (1 - score) < self.factor
        elif self.entropy_bound is not None:
            entropy = _entropy(shaped).gather(1, order)
            keep = entropy.cumsum(1) - entropy.cummax(1).values <= self.entropy_bound
        else:
            keep = n <= count
        return tokens, torch.zeros_like(masked).scatter(
            1, order, (keep | (n == 1)).expand_as(order)
        ) & masked

    def _score(
        self, logits: torch.Tensor, shaped: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        """The score (a, k) of each place, high ones first."""
        if self.remasking == "entropy":
            return -_entropy(shaped)
        if self.remasking == "topk_margin":
            best = shaped.softmax(-1).topk(2).values
            return best[..., 0] - best[..., 1]
        of = logits if self.remasking == "low_confidence" else shaped
        return (of.gather(-1, tokens[..., None])[..., 0] - of.logsumexp(-1)).exp()

    def _shaped(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits (a, k, v) of q: over T, and -inf beyond the likeliest tokens that make up top_p."""
        logits = logits / self.temperature if self.temperature > 0 else logits
        if self.top_p is None or self.top_p == 1:
            return logits
        ranked, order = logits.sort(-1, descending=True)
        p = ranked.softmax(-1)
        is_out = torch.zeros_like(logits, dtype=torch.bool).scatter(
            -1, order, p.cumsum(-1) - p > self.top_p
        )
        return logits.masked_fill(is_out, float("-inf"))


def _entropy(logits: torch.Tensor) -> torch.Tensor:
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def chat_settings(model: nn.Module, settings: dict[str, Any]) -> dict[str, Any]:
    """`settings` of `generate` for a prompt that comes from the chat template.

    Without a `block_length`, it is that of the model's own chat, if that divides gen_length, and its blocks `steps`.
    """
    backbone, sampling = Backbone(model), Sampling(**settings)
    block = (
        None if backbone.is_shifted else CHAT_BLOCK_LENGTHS.get(backbone.configured("model_type"))
    )
    if block is None or sampling.block_length is not None or sampling.gen_length % block:
        return settings
    is_even = (sampling.steps or 0) % (sampling.gen_length // block) == 0
    return {**settings, "block_length": block} if is_even else settings
