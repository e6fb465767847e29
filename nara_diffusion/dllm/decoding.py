"""The settings of `generate`, and the rules for placing tokens.

A step predicts a token x for each mask of a block, ranks the masks by a score, and places the n
best tokens of each row:

    remasking         score
    low_confidence    p(x), p = softmax(logits)                                 LLaDA
    random            a uniform random number                                   LLaDA
    maskgit_plus      q(x), q = softmax(logits / T) within top_p                Dream's `alg`
    topk_margin       q of the likeliest token − q of the second                Dream's `alg`
    entropy           − H(q)                                                    Dream's `alg`

    rule                   n, at least 1
    steps                  the block's tokens, spread evenly over its steps
    confidence_threshold   the number of scores above it                          (1)
    factor                 the largest n with (n + 1)(1 − n-th best score) < it   (1)
    entropy_bound          the largest n with H₁ + … + Hₙ − max(H₁, …, Hₙ) ≤ it   (2)

H₁, H₂, … are the entropies of q, in nats, in the order of the scores. All rules except `steps`
place several tokens at once if the model is sure of them (parallel decoding). The rules marked (1)
are from arXiv 2505.22618. Rule (2) is that of EB-Sampler, arXiv 2505.24857.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

REMASKING = ("low_confidence", "random", "maskgit_plus", "topk_margin", "entropy")
CACHES = ("prefix", "dual")
CONFIDENT = ("low_confidence", "maskgit_plus")
"""The scores that are probabilities."""
_ORDERS = {
    "steps": REMASKING,
    "confidence_threshold": CONFIDENT,
    "factor": CONFIDENT,
    "entropy_bound": (*CONFIDENT, "topk_margin", "entropy"),
}
"""{rule: the scores that it goes with}"""
_LAST = -1e9  # below every score


@dataclass(frozen=True)
class Sampling:
    """The settings of `generate`.

    Attributes:
        gen_length: the number of tokens of each answer.
        steps: the number of forwards. The default is one for each token.
        block_length: the number of tokens of a block. The default is gen_length.
        temperature: T. With 0, sampling is greedy.
        top_p: the total probability of the likeliest tokens to draw from. The default is to draw
            from all tokens.
        cfg_scale: w, the scale of classifier-free guidance. With 0, there is no guidance.
        remasking: the score; see the module's docstring.
        confidence_threshold, factor, entropy_bound: the parameter of a rule in the module's
            docstring. At most one of them can replace `steps`.
        logits_eos_inf: True to never predict the end token of the model's configuration, as in
            LLaDA's code. An answer then ends with another end token, or takes its full length.
        confidence_eos_eot_inf: True to place end tokens after all others, as in LLaDA's code.
        cache: "prefix" or "dual" for LLaDA and Dream, to compute the whole text only at the first
            step of each block (see `cached_sampler`). Both need `block_length`. They are approximate:
            exact match may fall by more than two points (docs/text.md), so measure it on your task.

    Raises:
        ValueError: a value is out of range, or two settings contradict each other.
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
    cache: str | None = None

    def __post_init__(self) -> None:
        length, steps, rules = self.gen_length, self.steps, self.rules
        blocks = length // max(self.block, 1)
        problems = {
            f"block_length {self.block} has to divide gen_length {length}": (
                self.block < 1 or length < 1 or length % self.block
            ),
            f"steps is {steps} and there are {blocks} blocks: pass a multiple of {blocks}, e.g. "
            f"{blocks} or {length}": blocks and steps is not None and (steps < 1 or steps % blocks),
            f"temperature is {self.temperature}, expected 0 or more": (
                not 0 <= self.temperature < float("inf")
            ),
            f"cfg_scale is {self.cfg_scale}, expected 0 or more": (
                not 0 <= self.cfg_scale < float("inf")
            ),
            f"top_p is {self.top_p}, expected more than 0 and at most 1": (
                self.top_p is not None and not 0 < self.top_p <= 1
            ),
            f"remasking is {self.remasking!r}, expected one of {REMASKING}": (
                self.remasking not in REMASKING
            ),
            f"cache is {self.cache!r}, expected 'prefix' or 'dual', or None": (
                self.cache not in (None, *CACHES)
            ),
            f"cache is {self.cache!r} and cfg_scale is {self.cfg_scale}, but a cache has no keys and "
            "values of texts with masked prompts: leave one of them out": (
                self.cache and self.cfg_scale
            ),
            f"{' and '.join(rules)} each say how many tokens a step places: give one of them": (
                len(rules) > 1
            ),
        }
        for problem, is_present in problems.items():
            if is_present:
                raise ValueError(problem)
        for rule in rules:
            if self.remasking not in _ORDERS[rule]:
                raise ValueError(
                    f"{rule} goes with remasking {' or '.join(_ORDERS[rule])}, and it is "
                    f"{self.remasking!r}"
                )

    @property
    def block(self) -> int:
        """The number of tokens of a block."""
        return self.gen_length if self.block_length is None else self.block_length

    @property
    def rules(self) -> list[str]:
        """The settings that say how many tokens a step places."""
        return [name for name in _ORDERS if getattr(self, name) is not None]

    def changed(self) -> dict[str, Any]:
        """Return gen_length and all settings that differ from their defaults."""
        settings = {"gen_length": self.gen_length}
        for name, value in vars(self).items():
            if value != getattr(Sampling, name):
                settings[name] = value
        return settings

    def in_own_blocks(self, block_length: int, refused: Sequence[str]) -> Sampling:
        """Return the settings with the blocks of a model that is sampled by its own blocks.

        Raises:
            ValueError: the settings have another block length, or one that is `refused`.
        """
        if self.block_length not in (None, block_length):
            raise ValueError(
                f"block_length is {self.block_length}, but the model has blocks of {block_length}: "
                "leave it out, or for attention by blocks set model.config.block_length"
            )
        for name, value in self.changed().items():
            if name in refused:
                raise ValueError(
                    f"{name} is {value!r}, but a model that is sampled by its own blocks doesn't "
                    f"take {name}: leave it out"
                )
        return replace(self, block_length=block_length)

    def tokens_per_step(self) -> list[int]:
        """Return the number of tokens that each step of a block places; ones without `steps`."""
        steps = (self.steps or self.gen_length) // (self.gen_length // self.block)
        share, extra = divmod(self.block, steps)
        return [share + (step < extra) for step in range(steps)]

    def place(
        self,
        logits: torch.Tensor,
        masked: torch.Tensor,
        count: int,
        last: torch.Tensor,
        uniform: Callable[..., torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict a token for each place of a block, and choose the places to fill.

        Args:
            logits: (a, k, v).
            masked: (a, k) bool, the places to choose from.
            count: the number of places that the rule `steps` chooses in each row.
            last: (e,) the tokens to place after all others.
            uniform: a function f(*shape of a row, dtype=…) → (a, *shape) that returns random
                numbers in [0, 1).

        Returns:
            Tokens (a, k), and the chosen places (a, k) bool.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        shaped = self._shaped(logits)
        tokens = shaped.argmax(-1)
        if self.temperature > 0:
            # The Gumbel noise is float64. At lower precision it takes too few values, and samples
            # get visibly worse (arXiv 2409.02908).
            draws = uniform(*shaped.shape[1:], dtype=torch.float64)
            draws = draws.clamp(min=torch.finfo(torch.float64).tiny)
            tokens = (shaped.double() - torch.log(-torch.log(draws))).argmax(-1)
        if len(last):
            logits = logits.index_fill(-1, last, float("-inf"))
            shaped = self._shaped(logits)
        if self.remasking == "random":
            score = uniform(masked.shape[1], dtype=logits.dtype)  # (a, k)
        else:
            score = self._score(logits, shaped, tokens)
        score = score.masked_fill(torch.isin(tokens, last), _LAST)
        score = score.masked_fill(~masked, float("-inf"))
        score, order = score.sort(dim=1, descending=True, stable=True)
        best = self._best(score, shaped, order, count)
        return tokens, torch.zeros_like(masked).scatter(1, order, best) & masked

    def _best(
        self, score: torch.Tensor, shaped: torch.Tensor, order: torch.Tensor, count: int
    ) -> torch.Tensor:
        """Return the mask of chosen places among the ranked ones (a, k); the first always is."""
        n = torch.arange(1, score.shape[1] + 1, device=score.device)  # (k,)
        if self.confidence_threshold is not None:
            best = score > self.confidence_threshold
        elif self.factor is not None:
            best = (n + 1) * (1 - score) < self.factor
        elif self.entropy_bound is not None:
            entropy = _entropy(shaped).gather(1, order)
            best = entropy.cumsum(1) - entropy.cummax(1).values <= self.entropy_bound
        else:
            best = n <= count
        return (best | (n == 1)).expand_as(score)

    def _score(
        self, logits: torch.Tensor, shaped: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        """Return the score (a, k) of each place; the highest is placed first."""
        if self.remasking == "entropy":
            return -_entropy(shaped)
        if self.remasking == "topk_margin":
            best = shaped.softmax(-1).topk(2).values
            return best[..., 0] - best[..., 1]
        scored = logits if self.remasking == "low_confidence" else shaped
        of_token = scored.gather(-1, tokens[..., None])[..., 0]  # (a, k)
        return (of_token - scored.logsumexp(-1)).exp()

    def _shaped(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits (a, k, v) of q: divided by T, and -inf for tokens outside top_p."""
        logits = logits / self.temperature if self.temperature > 0 else logits
        if self.top_p is None or self.top_p == 1:
            return logits
        ranked, order = logits.sort(-1, descending=True)
        p = ranked.softmax(-1)
        is_ranked_out = p.cumsum(-1) - p > self.top_p
        is_out = torch.zeros_like(is_ranked_out).scatter(-1, order, is_ranked_out)
        return logits.masked_fill(is_out, float("-inf"))


def _entropy(logits: torch.Tensor) -> torch.Tensor:
    return torch.special.entr(logits.softmax(-1)).sum(-1)
