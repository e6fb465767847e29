"""The texts with their masks during generation, and the step that fills some of the masks.

A step runs the model at λ, the masked share of each answer, and places tokens by the rules of
`decoding`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Protocol

import torch

from nara_diffusion.noise.context import find_holders

from .decoding import Sampling
from .models.backbone import Backbone
from .prompt_places import place_prompts


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of `generate`, with the model's own values for those that weren't given.

    Attributes:
        sampling: the settings, with the model's own values for some of them.
        ends: the tokens that end an answer; `stops` are the same, or none without stop_at_eos.
        configured_ends: the end tokens of the model's configuration.
        pad_token_id: the padding token; None if the configuration has none either.
    """

    backbone: Backbone
    sampling: Sampling
    input_ids: torch.Tensor
    prompt_lengths: torch.Tensor | Sequence[int] | None = None
    attention_mask: torch.Tensor | None = None
    mask_token_id: int | None = None
    ends: list[int]
    stops: list[int]
    configured_ends: list[int]
    pad_token_id: int | None = None
    generator: torch.Generator | None = None
    use_cache: bool | None = None
    on_step_end: Callable[[GenerationStep], None] | None = None


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

    def sizes(self, state: State) -> set[int]:
        """Return the numbers of tokens that λ may be the masked share of."""
        ...

    def logits(
        self, state: State, rows: torch.Tensor, positions: torch.Tensor, level: torch.Tensor
    ) -> torch.Tensor:
        """Return the logits (a, k, v) of `rows` (a,), given positions (b, k) and λ (b,)."""
        ...


class State:
    """The sequences during generation, with the step that fills some of their masks.

    Attributes:
        sequences, starts, attention_mask: the results of `place_prompts`.
        ends: (e,) the tokens that end an answer.
        last, never: the tokens that are placed after all others, and those that are never
            predicted.
        columns, positions: the places of an answer's tokens, (g,) in it and (b, g) in the sequences.
        masked: (b, g) bool, the tokens that are still masks.
        streams: a stream of random numbers for each row; empty if none are drawn.
        forwards: the number of forwards.
    """

    def __init__(self, request: Request) -> None:
        backbone, sampling = request.backbone, request.sampling
        mask = backbone.mask_token_id(request.mask_token_id)
        self.backbone, self.sampling, self.mask_token_id = backbone, sampling, mask
        self.sequences, self.starts, self.attention_mask = place_prompts(
            backbone,
            request.input_ids,
            sampling.gen_length,
            mask,
            mask if request.pad_token_id is None else request.pad_token_id,
            prompt_lengths=request.prompt_lengths,
            attention_mask=request.attention_mask,
        )
        device = self.starts.device
        tokens = partial(torch.tensor, dtype=torch.long, device=device)
        self.ends = tokens(request.stops)
        self.last = tokens(request.ends if sampling.confidence_eos_eot_inf else [])
        self.never = tokens([mask, *(request.configured_ends if sampling.logits_eos_inf else [])])
        self.columns = torch.arange(sampling.gen_length, device=device)  # (g,)
        self.positions = self.starts[:, None] + self.columns  # (b, g)
        self.masked = torch.ones_like(self.positions, dtype=torch.bool)  # (b, g)
        self.streams: list[torch.Generator] = []
        self.forwards = 0
        if sampling.temperature > 0 or sampling.remasking == "random":
            source = "cpu" if request.generator is None else request.generator.device
            size = (len(self.starts),)
            seeds = torch.randint(2**62, size, generator=request.generator, device=source)
            self.streams = [torch.Generator(device).manual_seed(seed) for seed in seeds.tolist()]

    def generation(self) -> Generation:
        """Return the result so far."""
        return Generation(self.sequences, self.answers, self.starts, self.forwards)

    @property
    def answers(self) -> torch.Tensor:
        return self.sequences.gather(1, self.positions)  # (b, g)

    def fill(self, reader: Reader, on_step_end: Callable[[GenerationStep], None] | None) -> None:
        """Fill all masks, block by block. The host reads once per step which rows have one left.

        If the rule is `steps`, their λ are known before, and adapters compute C for all at once.
        """
        with ExitStack() as plans:
            if on_step_end is None and set(self.sampling.rules) <= {"steps"}:
                levels = self.planned_levels(reader.sizes(self))
                for holder in find_holders(self.backbone.model):
                    plans.enter_context(holder.planning(levels))
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

    def planned_levels(self, sizes: set[int]) -> torch.Tensor:
        """Return λ of the steps, and 0, for masked shares of `sizes` tokens: (n,), on the CPU."""
        counts = self.sampling.tokens_per_step() * (max(sizes) // self.sampling.block)
        placed = [0, *accumulate(counts)]
        levels = {max(size - count, 0) / size for size in sizes for count in placed}
        return torch.tensor(sorted(levels), dtype=torch.float32)

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
        is_after_end = has_end & ~is_open & (self.columns > first)  # (b, g)
        filled = torch.where(is_after_end, answers.gather(1, first), answers)
        self.sequences = self.sequences.scatter(1, self.positions, filled)
        self.masked = self.masked & ~is_after_end
