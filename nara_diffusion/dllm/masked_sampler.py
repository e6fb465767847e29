"""LLaDA's semi-autoregressive sampler (arXiv 2502.09992, algorithms 4 and 5), and its canvas.

The canvas is a prompt followed by `gen_length` masks. It is filled block by block, and the model
also sees the masks of later blocks. In each step the model predicts every mask of the block, and
the rules of `decoding` choose which of them to fill. Classifier-free guidance combines logits as
(1 + w) · l(x) − w · l(x with its prompt masked).

In each step, a noise-aware model runs each sample at λ, the masked share of the whole answer, which
goes from 1 to 0. Rows with masked prompts have the λ of their sample. Keys and values change with
each token and with λ, so only approximate caches are possible (`cached_sampler`). The differences
from LLaDA's code are:

- Prompts may differ in length. Each is followed by its own answer, and padding is on the right, as
  in training.
- The mask token is never predicted, so a step can't undo an earlier step.
- A row is finished if no mask is left before its first end-of-sequence token. This token then fills
  the rest of the answer. Sampling stops when all rows are finished.
- Steps without a token to place are skipped, and so are rows without such a token. This doesn't
  change the result, since λ depends on masks and not on steps.

A model learns the end of an answer from the end tokens that training puts after it, which should
therefore reach as far as the canvas does. A model trained on fewer end tokens may continue after
the answer, or make the answer as long as the canvas.

In each step the host reads only which rows still have a mask in the block, and waits for the device
only there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nara_diffusion.noise.rows import guidance_rows

from .decoding import Sampling
from .models.backbone import Backbone
from .models.forward_rows import conditioned, guided, rows_of_guidance
from .prompt_places import place_prompts


@dataclass(frozen=True)
class Generation:
    """The result of `generate`.

    Attributes:
        sequences: (b, l) token ids: prompt, answer, padding.
        answers: (b, gen_length) token ids.
        prompt_lengths: (b,) the start of each answer in `sequences`.
        forwards: the number of forwards; a guided step counts as one.
    """

    sequences: Tensor
    answers: Tensor
    prompt_lengths: Tensor
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
    noise_level: Tensor
    sequences: Tensor
    masked: Tensor
    stop: bool = False


class State:
    """The sequences during generation, with the step that fills some of their masks.

    Attributes:
        sequences, starts, attention_mask: the results of `place_prompts`.
        ends: (e,) the tokens that end an answer.
        last, never: the tokens that are placed after all others, and those that are never
            predicted.
        positions: (b, g) the places of an answer's tokens in the sequences.
        masked: (b, g) bool, the tokens that are still masks.
        streams: a stream of random numbers for each row; empty if none are drawn.
        forwards: the number of forwards.

    Args:
        eos_token_id: the tokens that end an answer.
        stop_at_eos: True to finish a row at its first end token.
        pad_token_id: the padding token; None takes the mask token.
    """

    def __init__(
        self,
        backbone: Backbone,
        sampling: Sampling,
        input_ids: Tensor,
        *,
        eos_token_id: int | Sequence[int] | None,
        prompt_lengths: Tensor | Sequence[int] | None = None,
        attention_mask: Tensor | None = None,
        mask_token_id: int | None = None,
        pad_token_id: int | None = None,
        stop_at_eos: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        mask = backbone.mask_token_id(mask_token_id)
        self.backbone, self.sampling, self.mask_token_id = backbone, sampling, mask
        self.sequences, self.starts, self.attention_mask = place_prompts(
            backbone,
            input_ids,
            sampling.gen_length,
            mask,
            mask if pad_token_id is None else pad_token_id,
            prompt_lengths=prompt_lengths,
            attention_mask=attention_mask,
        )
        device = self.starts.device

        def tokens(ids: int | Sequence[int] | None, is_used: bool = True) -> Tensor:
            used = ids if is_used and ids is not None else []
            return torch.as_tensor(used, dtype=torch.long, device=device).reshape(-1)

        self.ends = tokens(eos_token_id, stop_at_eos)
        self.last = tokens(eos_token_id, sampling.confidence_eos_eot_inf)
        configured = tokens(backbone.configured("eos_token_id"), sampling.logits_eos_inf)
        self.never = torch.cat([tokens(mask), configured])
        self.positions = self.starts[:, None] + torch.arange(sampling.gen_length, device=device)
        self.masked = torch.ones_like(self.positions, dtype=torch.bool)  # (b, g)
        self.streams: list[torch.Generator] = []
        self.forwards = 0
        if sampling.temperature > 0 or sampling.remasking == "random":
            source = "cpu" if generator is None else generator.device
            size = (len(self.starts),)
            seeds = torch.randint(2**62, size, generator=generator, device=source)
            self.streams = [torch.Generator(device).manual_seed(seed) for seed in seeds.tolist()]

    def generation(self) -> Generation:
        """Return the result so far."""
        return Generation(self.sequences, self.answers, self.starts, self.forwards)

    @property
    def answers(self) -> Tensor:
        return self.sequences.gather(1, self.positions)  # (b, g)

    def fill(
        self, reader: WholeText, on_step_end: Callable[[GenerationStep], None] | None = None
    ) -> None:
        """Fill all masks, block by block. The host reads once per step which rows have one left."""
        for positions in reader.blocks(self):
            for count in filter(None, self.sampling.tokens_per_step()):
                masked = self.masked_at(positions)
                rows = [row for row, is_open in enumerate(masked.any(1).tolist()) if is_open]
                if not rows:
                    break
                level = reader.level(self, positions)
                self.step(reader, rows, positions, level, count)
                if on_step_end is None:
                    continue
                sequences, masked = self.sequences.clone(), self.masked.clone()
                step = GenerationStep(self.forwards - 1, level, sequences, masked)
                on_step_end(step)
                self.sequences = step.sequences
                self.masked &= self.answers == self.mask_token_id
                if step.stop:
                    return

    def are_answers(self, positions: Tensor) -> Tensor:
        """Return which positions (b, k) belong to the answers, as bool."""
        columns = positions - self.starts[:, None]
        return (columns >= 0) & (columns < self.sampling.gen_length)

    def masked_at(self, positions: Tensor) -> Tensor:
        """Return which positions (b, k) hold a mask, as bool."""
        columns = positions - self.starts[:, None]
        masked = self.masked.gather(1, columns.clamp(0, self.sampling.gen_length - 1))
        return masked & self.are_answers(positions)

    def step(
        self, reader: WholeText, rows: list[int], positions: Tensor, level: Tensor, count: int
    ) -> None:
        """Place tokens in the a rows `rows`, at some of the masked `positions` (b, k).

        A row is then filled after its first end token, if no mask comes before that token.

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
        answers = self.answers
        is_end = torch.isin(answers, self.ends) & (self.masked.cumsum(1) == 0)  # (b, g)
        is_after_end = is_end.cumsum(1) > is_end.int()
        first = is_end.int().argmax(1, keepdim=True)  # (b, 1)
        filled = torch.where(is_after_end, answers.gather(1, first), answers)
        self.sequences = self.sequences.scatter(1, self.positions, filled)
        self.masked = self.masked & ~is_after_end

    def _uniform(self, rows: list[int], *shape: int, dtype: torch.dtype) -> Tensor:
        """Return the next random numbers (a, *shape); each row has its own stream."""
        streams = [self.streams[row] for row in rows]
        draw = partial(torch.rand, shape, dtype=dtype, device=self.starts.device)
        return torch.stack([draw(generator=stream) for stream in streams])


class WholeText:
    """Read all of a text at each step, with guidance. λ is the masked share of the answer."""

    def blocks(self, state: State) -> Iterable[Tensor]:
        """Yield the positions (b, k) of each block, in the order of filling."""
        return state.positions.split(state.sampling.block, dim=1)

    def level(self, state: State, positions: Tensor) -> Tensor:
        """Return λ (b,) for the next step at these positions (b, k)."""
        return state.masked.float().mean(1)

    def logits(self, state: State, rows: Tensor, positions: Tensor, level: Tensor) -> Tensor:
        """Return the logits (a, k, v) of `rows` (a,), given positions (b, k) and λ (b,)."""
        w, positions, level = state.sampling.cfg_scale, positions[rows], level[rows]
        inputs = state.sequences[rows]
        padding = None if state.attention_mask is None else state.attention_mask[rows]
        if w > 0:
            columns = torch.arange(inputs.shape[1], device=rows.device)
            is_prompt = columns < state.starts[rows, None]  # (a, l)
            inputs, padding, level = rows_of_guidance(
                inputs, padding, level, is_prompt, state.mask_token_id
            )  # 2a rows
            positions = guidance_rows(positions)
        with conditioned(state.backbone.model, level):
            logits = state.backbone.logits(inputs, padding, at=positions)
        return guided(logits.unflatten(0, (-1, len(rows))), w)
