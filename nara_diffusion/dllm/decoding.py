"""The settings of `generate`, the rules for placing tokens, and the step that places them.

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

`State` holds the texts with their masks. Its step runs the model at λ, the masked share of each
answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from .models.backbone import Backbone

REMASKING = ("low_confidence", "random", "maskgit_plus", "topk_margin", "entropy")
CHAT_SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"block_length": 32},  # LLaDA
    "qwen3_moe": {"block_length": 32},  # LLaDA-MoE
    "llada2_moe": {"confidence_threshold": 0.95},  # its block length is the model's
}
"""{model_type: the published settings for chats}. Dream's chat uses a single block."""
_PARALLEL = ("confidence_threshold", "factor", "entropy_bound")
_CONFIDENT = ("low_confidence", "maskgit_plus")
"""The scores that are probabilities."""
_OF_CANVAS = ("gen_length", "steps", "block_length", "temperature", "entropy_bound")
"""The settings of DiffusionGemma's sampler."""
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

    def __post_init__(self) -> None:
        self._check_lengths()
        for name in ("temperature", "cfg_scale"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, expected more than 0 and at most 1")
        if self.remasking not in REMASKING:
            expected = ", ".join(map(repr, REMASKING))
            raise ValueError(f"remasking is {self.remasking!r}, expected one of {expected}")
        self._check_rule()

    def _check_lengths(self) -> None:
        block, length = self.block, self.gen_length
        if block < 1 or length < 1 or length % block:
            raise ValueError(f"block_length {block} has to divide gen_length {length}")
        blocks = length // block
        if self.steps is not None and (self.steps < blocks or self.steps % blocks):
            raise ValueError(
                f"steps is {self.steps} and there are {blocks} blocks: pass a multiple of "
                f"{blocks}, e.g. {blocks} or {length}"
            )

    def _check_rule(self) -> None:
        """Raise ValueError if there are several rules, or the rule doesn't fit `remasking`."""
        rules = [name for name in ("steps", *_PARALLEL) if getattr(self, name) is not None]
        if len(rules) > 1:
            raise ValueError(
                f"{' and '.join(rules)} each say how many tokens a step places: give one of them"
            )
        orders = REMASKING
        if rules in (["confidence_threshold"], ["factor"]):
            orders = _CONFIDENT
        elif rules == ["entropy_bound"]:
            orders = (*_CONFIDENT, "topk_margin", "entropy")
        if self.remasking not in orders:
            expected = " or ".join(orders)
            raise ValueError(
                f"{rules[0]} goes with remasking {expected}, and it is {self.remasking!r}"
            )

    @property
    def block(self) -> int:
        """The number of tokens of a block."""
        return self.gen_length if self.block_length is None else self.block_length

    def changed(self) -> dict[str, Any]:
        """Return gen_length and all settings that differ from their defaults."""
        found = {"gen_length": self.gen_length}
        for name, value in vars(self).items():
            if value != getattr(Sampling, name):
                found[name] = value
        return found

    def tokens_per_step(self) -> list[int]:
        """Return the number of tokens that each step of a block places; ones without `steps`."""
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
        tokens = self._tokens(shaped, uniform)
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

    def _tokens(self, shaped: torch.Tensor, uniform: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Return the predicted tokens (a, k): the likeliest ones, or a sample of q."""
        if self.temperature == 0:
            return shaped.argmax(-1)
        # The Gumbel noise is float64. At lower precision it takes too few values, and samples get
        # visibly worse (arXiv 2409.02908).
        draws = uniform(*shaped.shape[1:], dtype=torch.float64)
        draws = draws.clamp(min=torch.finfo(torch.float64).tiny)
        return (shaped.double() - torch.log(-torch.log(draws))).argmax(-1)

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


def model_sampling(model: nn.Module, sampling: Sampling, *, chat: bool) -> Sampling:
    """Return `sampling` with the model's own values for some settings.

    If the model has blocks or a canvas, that is the block. For a chat, unset settings take the
    model's published values, if its block length divides gen_length, the number of blocks divides
    `steps`, and the score is a probability for a threshold.

    Args:
        chat: True if the prompts come from the chat template.

    Raises:
        ValueError: the model's blocks have another length, or its sampler doesn't take a setting.
    """
    backbone = Backbone(model)
    settings = CHAT_SETTINGS.get(backbone.configured("model_type") or "", {}) if chat else {}
    block = backbone.configured("canvas_length") if backbone.has_canvas else backbone.block_length
    if block is not None:
        _check_blocks(block, sampling, backbone.has_canvas)
        sampling = replace(sampling, block_length=block)
    elif backbone.is_shifted or sampling.block_length is not None:
        return sampling
    elif "block_length" in settings:
        block = settings["block_length"]
        blocks, rest = divmod(sampling.gen_length, block)
        if rest or (sampling.steps or 0) % blocks:
            return sampling
        sampling = replace(sampling, block_length=block)
    rules = [name for name in ("steps", *_PARALLEL) if getattr(sampling, name) is not None]
    has_confidence = sampling.remasking in _CONFIDENT
    if "confidence_threshold" in settings and has_confidence and not rules:
        return replace(sampling, confidence_threshold=settings["confidence_threshold"])
    return sampling


def _check_blocks(block_length: int, sampling: Sampling, has_canvas: bool) -> None:
    if sampling.block_length not in (None, block_length):
        raise ValueError(
            f"block_length is {sampling.block_length}, but the model has blocks of {block_length}: "
            "leave it out, or for LLaDA2 set model.config.block_length"
        )
    for name, value in sampling.changed().items():
        if name == "cfg_scale" or (has_canvas and name not in _OF_CANVAS):
            raise ValueError(
                f"{name} is {value!r}, which a model that is sampled by its own blocks doesn't take"
            )


# ---------------------------------------------------------------- the result


@dataclass(frozen=True)
class Generation:
    """The result of `generate`.

    Attributes:
        sequences: (b, l) token ids: prompt, answer, padding.
        answers: (b, gen_length) token ids.
        prompt_lengths: (b,) the start of each answer in `sequences`.
        forwards: the number of forwards; a guided step counts as one.
    """

    sequences: torch.Tensor
    answers: torch.Tensor
    prompt_lengths: torch.Tensor
    forwards: int


# ---------------------------------------------------------------- the state of sampling, and its step


@dataclass
class GenerationStep:
    """The argument of `on_step_end`, which may change `sequences` and `stop`.

    Attributes:
        index: the index of the step, from 0.
        noise_level: (b,) the λ that the model ran at; 0 for finished rows.
        sequences: (b, l) prompt, answer so far, padding. `on_step_end` may fill masks, but must not
            add any.
        masked: (b, gen_length) bool, the tokens of the answers that are still masks.
        stop: set to True to end sampling after this step. Masks that are left then remain.
    """

    index: int
    noise_level: torch.Tensor
    sequences: torch.Tensor
    masked: torch.Tensor
    stop: bool = False


class Reader(Protocol):
    """A way to read a text with masks."""

    def blocks(self, state: State) -> Iterable[torch.Tensor]:
        """Yield the positions (b, k) of each block, in the order of filling."""
        ...

    def level(self, state: State, positions: torch.Tensor) -> torch.Tensor:
        """Return λ (b,) for the next step at these positions (b, k)."""
        ...

    def logits(
        self, state: State, rows: torch.Tensor, positions: torch.Tensor, level: torch.Tensor
    ) -> torch.Tensor:
        """Return the logits (a, k, v) of `rows` (a,), given positions (b, k) and λ (b,)."""
        ...


@dataclass
class State:
    """The sequences during generation, with the step that fills some of their masks.

    Attributes:
        ends: (e,) the tokens that end an answer.
        last, never: the tokens that are placed after all others, and those that are never
            predicted.
        sequences, starts, attention_mask: the results of `place_prompts`.
        generator: the generator that seeds a stream of random numbers for each row.
    """

    backbone: Backbone
    sampling: Sampling
    mask_token_id: int
    ends: torch.Tensor
    last: torch.Tensor
    never: torch.Tensor
    sequences: torch.Tensor
    starts: torch.Tensor
    attention_mask: torch.Tensor | None
    generator: torch.Generator | None
    forwards: int = 0

    def __post_init__(self) -> None:
        device = self.starts.device
        self.columns = torch.arange(self.sampling.gen_length, device=device)  # (g,)
        self.positions = self.starts[:, None] + self.columns  # (b, g)
        self.masked = torch.ones_like(self.positions, dtype=torch.bool)  # (b, g)
        self.streams: list[torch.Generator] = []
        if self.sampling.temperature > 0 or self.sampling.remasking == "random":
            source = "cpu" if self.generator is None else self.generator.device
            size = (len(self.starts),)
            seeds = torch.randint(2**62, size, generator=self.generator, device=source)
            self.streams = [torch.Generator(device).manual_seed(seed) for seed in seeds.tolist()]

    @property
    def answers(self) -> torch.Tensor:
        return self.sequences.gather(1, self.positions)  # (b, g)

    def fill(self, reader: Reader, on_step_end: Callable[[GenerationStep], None] | None) -> None:
        """Fill all masks, block by block. The host reads once per step which rows have one left."""
        for positions in reader.blocks(self):
            for count in filter(None, self.sampling.tokens_per_step()):
                masked = self.masked_at(positions)
                rows = [row for row, is_open in enumerate(masked.any(1).tolist()) if is_open]
                if not rows:
                    break
                level = reader.level(self, positions)
                self.step(reader, rows, positions, level, count)
                if on_step_end is not None and self._is_stopped(on_step_end, level):
                    return

    def are_answers(self, positions: torch.Tensor) -> torch.Tensor:
        """Return which positions (b, k) belong to the answers, as bool."""
        columns = positions - self.starts[:, None]
        return (columns >= 0) & (columns < self.sampling.gen_length)

    def masked_at(self, positions: torch.Tensor) -> torch.Tensor:
        """Return which positions (b, k) hold a mask, as bool."""
        columns = positions - self.starts[:, None]
        masked = self.masked.gather(1, columns.clamp(0, self.sampling.gen_length - 1))
        return masked & self.are_answers(positions)

    def step(
        self,
        reader: Reader,
        rows: list[int],
        positions: torch.Tensor,
        level: torch.Tensor,
        count: int,
    ) -> None:
        """Place tokens in the a rows `rows`, at some of the masked `positions` (b, k).

        Args:
            level: (b,) λ.
            count: the number of tokens that the rule `steps` places in each row.
        """
        self.forwards += 1
        index = torch.tensor(rows).to(positions.device, non_blocking=True)  # (a,)
        logits = reader.logits(self, index, positions, level)  # (a, k, v)
        logits = logits.index_fill(-1, self.never, float("-inf"))
        masked, uniform = self.masked_at(positions)[index], partial(self._uniform, rows)
        tokens, chosen = self.sampling.place(logits, masked, count, self.last, uniform)
        sequences, positions = self.sequences[index], positions[index]
        tokens = torch.where(chosen, tokens, sequences.gather(1, positions))
        placed = sequences.scatter(1, positions, tokens)
        self.sequences = self.sequences.index_copy(0, index, placed)
        self.masked = self.masked & (self.answers == self.mask_token_id)
        self._finish_rows()

    def _is_stopped(
        self, on_step_end: Callable[[GenerationStep], None], noise_level: torch.Tensor
    ) -> bool:
        """Call `on_step_end`, take over its sequences, and return True if it ends sampling."""
        sequences, masked = self.sequences.clone(), self.masked.clone()
        step = GenerationStep(self.forwards - 1, noise_level, sequences, masked)
        on_step_end(step)
        self.sequences = step.sequences
        self.masked &= self.answers == self.mask_token_id
        return step.stop

    def _uniform(self, rows: list[int], *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the next random numbers (a, *shape); each row has its own stream."""
        draws = []
        for row in rows:
            stream = self.streams[row]
            draws.append(torch.rand(shape, dtype=dtype, device=stream.device, generator=stream))
        return torch.stack(draws)

    def _finish_rows(self) -> None:
        """Fill each row after its first end token, if no mask comes before that token."""
        answers = self.answers
        is_end = torch.isin(answers, self.ends) & ~self.masked  # (b, g)
        has_end = is_end.any(1, keepdim=True)  # (b, 1)
        last = len(self.columns) - 1
        first = torch.where(has_end, is_end.int().argmax(1, keepdim=True), last)  # (b, 1)
        is_open = (self.masked & (self.columns < first)).any(1, keepdim=True)
        rest = has_end & ~is_open & (self.columns > first)  # (b, g)
        filled = torch.where(rest, answers.gather(1, first), answers)
        self.sequences = self.sequences.scatter(1, self.positions, filled)
        self.masked = self.masked & ~rest
