"""The state of sampling: texts with masks, and the step that fills some of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from nara_diffusion.noise.rows import guidance_rows

from .canvas import ForwardRows, conditioned
from .decoding import Sampling
from .models.backbone import Backbone, guided


@dataclass
class GenerationStep:
    """The argument of `on_step_end`, which may change `sequences` and `stop`.

    Attributes:
        index: the number of steps before this one.
        noise_level: (b,) the λ that the model ran at; rows that are done have 0.
        sequences: (b, l) prompt, answer so far, padding. A mask may be filled; no other token may
            become a mask.
        masked: (b, gen_length) which tokens of the answers are still masks.
        stop: True ends sampling after this step; masks that are left stay.
    """

    index: int
    noise_level: torch.Tensor
    sequences: torch.Tensor
    masked: torch.Tensor
    stop: bool = False


@dataclass
class State:
    """The sequences, and the step that fills some of their masks.

    Attributes:
        ends: (e,) the tokens that end an answer.
        last, never: the tokens that are placed after all others, and those that are never
            predicted.
        sequences, starts, attention_mask: what `place_prompts` returned.
        generator: seeds the rows' own streams of random numbers.
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

    def fill(self, on_step_end: Callable[[GenerationStep], None] | None) -> None:
        """Fill all masks, block by block."""
        for start in range(0, self.sampling.gen_length, self.sampling.block):
            columns = slice(start, start + self.sampling.block)
            for count in filter(None, self.sampling.tokens_per_step()):
                rows = self._open_rows(columns)
                if not rows:
                    break
                noise_level = self.masked.float().mean(1)  # (b,)
                self._step(rows, columns, count)
                self.finish_rows()
                if on_step_end is not None and self.is_stopped(on_step_end, noise_level):
                    return

    def is_stopped(
        self, on_step_end: Callable[[GenerationStep], None], noise_level: torch.Tensor
    ) -> bool:
        """Call `on_step_end`, take its sequences, and return True if it stops."""
        sequences, masked = self.sequences.clone(), self.masked.clone()
        step = GenerationStep(self.forwards - 1, noise_level, sequences, masked)
        on_step_end(step)
        self.sequences = step.sequences
        self.masked &= self.answers == self.mask_token_id
        return step.stop

    def _open_rows(self, columns: slice) -> list[int]:
        """Return the rows with a mask left in the block. The host reads them."""
        is_open = self.masked[:, columns].any(1).tolist()
        return [row for row, is_one in enumerate(is_open) if is_one]

    def _step(self, open_rows: list[int], columns: slice, count: int) -> None:
        """Place tokens in the a rows that are not done with the block."""
        rows = torch.tensor(open_rows).to(self.masked.device, non_blocking=True)  # (a,)
        positions, masked = self.positions[rows, columns], self.masked[rows, columns]  # (a, k)
        self.place(open_rows, positions, masked, self._logits(rows, positions), count)

    def place(
        self,
        rows: list[int],
        positions: torch.Tensor,
        masked: torch.Tensor,
        logits: torch.Tensor,
        count: int,
    ) -> None:
        """Place tokens of a `rows` at some of the `masked` (a, k) ones among `positions` (a, k).

        Args:
            logits: (a, k, v), changed in place.
            count: how many of a row are placed by the rule `steps`.
        """
        logits = logits.index_fill_(-1, self.never, float("-inf"))
        uniform = partial(self._uniform, rows)
        tokens, chosen = self.sampling.place(logits, masked, count, self.last, uniform)
        index = torch.tensor(rows).to(positions.device, non_blocking=True)  # (a,)
        sequences = self.sequences[index]
        tokens = torch.where(chosen, tokens, sequences.gather(1, positions))
        placed = sequences.scatter(1, positions, tokens)
        self.sequences = self.sequences.index_copy(0, index, placed)
        self.masked = self.masked & (self.answers == self.mask_token_id)

    def _logits(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return guided logits (a, k, v) of `rows` (a,), each at its λ, at `positions` (a, k)."""
        self.forwards += 1
        w = self.sampling.cfg_scale
        padding = None if self.attention_mask is None else self.attention_mask[rows]
        noise_level = self.masked[rows].float().mean(1)  # (a,)
        given = ForwardRows(self.sequences[rows], padding, noise_level)  # a rows
        if w > 0:
            columns = torch.arange(self.sequences.shape[1], device=rows.device)
            is_prompt = columns < self.starts[rows, None]  # (a, l)
            given = given.with_masked_prompts(is_prompt, self.mask_token_id)  # 2a rows
            positions = guidance_rows(positions)
        with conditioned(self.backbone.model, given.noise_level):
            logits = self.backbone.logits(given.input_ids, given.attention_mask, at=positions)
        return guided(logits.clone().unflatten(0, (-1, len(rows))), w)

    def _uniform(self, rows: list[int], *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the next random numbers of a rows, each from its own stream: (a, *shape)."""
        draws = []
        for row in rows:
            stream = self.streams[row]
            draws.append(torch.rand(shape, dtype=dtype, device=stream.device, generator=stream))
        return torch.stack(draws)

    def finish_rows(self) -> None:
        """Fill the rest of each row that has no mask before its first end token."""
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
