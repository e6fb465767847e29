"""LLaDA's semi-autoregressive sampler (arXiv 2502.09992, algorithms 4 and 5).

The answer starts as `gen_length` masks and is filled block by block, the later blocks' masks in sight. At each step the
model predicts every mask of the block, and those that the remasking rule ranks highest are kept:

    low_confidence   rank by the probability of the predicted token
    random           rank by a uniform random number

either `steps` in all, spread evenly over the blocks and their tokens, or, with `confidence_threshold`, every token
whose probability exceeds it and one at least a step (parallel decoding, arXiv 2505.22618). Tokens are argmax(logits
/ T + Gumbel noise); classifier-free guidance combines logits as (1 + w) · l(x) − w · l(x with its prompt masked).

A noise-aware model is told λ = masked share of the answer, per sample, at each step, over all blocks, so it goes
from 1 to 0; the guided half of a batch has the λ of its sample. What differs from LLaDA's own generate():

- an empty prompt becomes a BOS token where position i predicts token i + 1 (Dream), so that something predicts the
  first token of the answer;
- prompts of unequal length: each answer follows its own prompt directly, and padding stands on the right, as in
  training;
- the mask token is never predicted, so that a step cannot undo another;
- a row whose first end-of-sequence token has no mask before it is done: the rest of its answer is filled with that
  token. When all rows are done, sampling stops;
- steps that have no token to place are skipped, and rows that have none sit out. That changes nothing, since λ counts
  masks and not steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from nara_diffusion.dllm.data.prompts import Canvas, place_prompts
from nara_diffusion.dllm.models.lm_head import configured, logits_at
from nara_diffusion.dllm.models.positions import position_limit
from nara_diffusion.dllm.models.shifted_logits import opening_token
from nara_diffusion.dllm.models.virtual_tokens import of_text
from nara_diffusion.utils.eval_mode import evaluating, without_ddp

from .loss import logits_of, mask_token_of
from .noise_conditioning import conditioned
from .remasking import RowRandom, above, confidence_of, highest, sample_tokens
from .sampler_config import Sampling


@dataclass(frozen=True)
class Generation:
    """Attributes:
    sequences: (b, l) prompt, answer, padding.
    answers: (b, gen_length).
    prompt_lengths: (b,) where each answer starts.
    forwards: the number of forwards; a guided step counts once.
    """

    sequences: torch.Tensor
    answers: torch.Tensor
    prompt_lengths: torch.Tensor
    forwards: int


@dataclass
class GenerationStep:
    """The argument of `on_step_end`, after each step. `on_step_end` may change `sequences` and `stop`.

    Attributes:
    index: the number of steps before this one.
    noise_level: (b,) λ before this step, which the model was told; rows that are done have 0.
    sequences: (b, l) prompt, answer so far, padding. A mask may be filled; no other token may become a mask.
    masked: (b, gen_length) which tokens of the answers are masks still.
    stop: True ends sampling after this step; masks that are left stay.
    """

    index: int
    noise_level: torch.Tensor
    sequences: torch.Tensor
    masked: torch.Tensor
    stop: bool = False


@torch.no_grad()
def generate(
    model: nn.Module,
    input_ids: torch.Tensor,
    *,
    gen_length: int = 128,
    steps: int | None = None,
    block_length: int | None = None,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    remasking: str = "low_confidence",
    confidence_threshold: float | None = None,
    prompt_lengths: torch.Tensor | Sequence[int] | None = None,
    attention_mask: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    mask_token_id: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    stop_at_eos: bool = True,
    pad_token_id: int | None = None,
    return_stats: bool = False,
    on_step_end: Callable[[GenerationStep], None] | None = None,
) -> torch.Tensor | Generation:
    """Answer the prompts in `input_ids`.

    Args:
        model: the outermost module. Of a DistributedDataParallel its `.module` runs, since processes may need different
            numbers of steps; under FSDP and DeepSpeed ZeRO-3 give every process the same number (stop_at_eos=False
            and no confidence_threshold).
        input_ids: (b, p) prompts, of any integer type.
        gen_length: the number of tokens of each answer.
        steps: the number of forwards; default: one for each token.
        block_length: the number of tokens of a block; default: gen_length.
        temperature: T; 0 is greedy.
        cfg_scale: w, the scale of classifier-free guidance; 0 turns it off.
        remasking: "low_confidence" or "random".
        confidence_threshold: place every token above it, instead of counting `steps`.
        prompt_lengths: (b,) of prompts padded on the right.
        attention_mask: (b, p), instead of `prompt_lengths`; padding may stand on either side.
        generator: seeds a stream of random numbers a row, for Gumbel noise and random remasking: what a row draws
            doesn't depend on the rows beside it, but for its place among them.
        mask_token_id: by default that of the model's configuration.
        eos_token_id: one or several; by default those of the configuration.
        pad_token_id: by default that of the configuration.
        stop_at_eos: finish a row at its first eos token.
        return_stats: return a `Generation`, with the number of forwards, in place of the sequences.
        on_step_end: called after each step with a `GenerationStep`, which it may change.

    Returns:
        (b, longest prompt + gen_length) int64 token ids: prompt, answer, and padding on the right of shorter rows. An
        empty prompt becomes a BOS token if the model predicts the next token (Dream).

    Raises:
        ValueError: impossible arguments, a prompt that holds the mask token, more positions than the model has,
            sequences that `on_step_end` spoiled, or an adapter that was trained with another λ than the masked share.
    """
    sampling = Sampling(
        gen_length=gen_length,
        steps=steps,
        block_length=gen_length if block_length is None else block_length,
        temperature=temperature,
        cfg_scale=cfg_scale,
        remasking=remasking,
        confidence_threshold=confidence_threshold,
    )
    model = without_ddp(model)
    mask = mask_token_of(model, mask_token_id)
    padding = pad_token_id if pad_token_id is not None else configured(model, "pad_token_id")
    ends = eos_token_id if eos_token_id is not None else configured(model, "eos_token_id")
    canvas = place_prompts(
        input_ids,
        gen_length=gen_length,
        mask_token_id=mask,
        pad_token_id=mask if padding is None else padding,
        prompt_lengths=prompt_lengths,
        attention_mask=attention_mask,
        opening_token=partial(opening_token, model),
        max_length=position_limit(model),
    )
    state = _State(model, canvas, sampling, mask, _token_ids(ends) if stop_at_eos else [], generator)
    with evaluating(model):
        state.fill(on_step_end)
    return state.result() if return_stats else state.sequences


class _State:
    """The state of the sampler: the sequences, and the step that fills some of their masks."""

    def __init__(
        self,
        model: nn.Module,
        canvas: Canvas,
        sampling: Sampling,
        mask_token_id: int,
        ends: list[int],
        generator: torch.Generator | None,
    ) -> None:
        self.model, self.sampling, self.ends = model, sampling, ends
        self.sequences, self.starts, self.mask_token_id = canvas.sequences, canvas.starts, mask_token_id
        self.attention_mask = None if canvas.real.all() else canvas.real.long()  # (b, l)
        device = canvas.sequences.device
        self.positions = canvas.starts[:, None] + torch.arange(sampling.gen_length, device=device)  # (b, g)
        self.masked = torch.ones_like(self.positions, dtype=torch.bool)  # (b, g)
        self.answer = torch.zeros_like(canvas.real).scatter(1, self.positions, True)  # (b, l)
        self.random = RowRandom(generator, len(canvas.starts), device) if sampling.is_random else None
        self.forwards = 0

    @property
    def answers(self) -> torch.Tensor:
        """(b, g) token ids."""
        return self.sequences.gather(1, self.positions)

    def fill(self, on_step_end: Callable[[GenerationStep], None] | None) -> None:
        """Fill all masks, block by block."""
        width = self.sampling.block_length
        counts = self.sampling.tokens_per_step() or [None] * width
        for start in range(0, self.sampling.gen_length, width):
            columns = slice(start, start + width)
            for count in counts:
                if count == 0 or not self.masked[:, columns].any():
                    continue
                noise_level = self.masked.float().mean(1)  # (b,)
                self._step(columns, count)
                self._finish_rows()
                if on_step_end is not None and self._show(on_step_end, noise_level):
                    return

    def _show(self, on_step_end: Callable[[GenerationStep], None], noise_level: torch.Tensor) -> bool:
        """Call `on_step_end`, take its changes over, and return whether to stop."""
        step = GenerationStep(self.forwards - 1, noise_level, self.sequences.clone(), self.masked.clone())
        on_step_end(step)
        given, own = step.sequences, self.sequences
        if given.shape != own.shape or given.dtype != own.dtype or given.device != own.device:
            raise ValueError(
                f"on_step_end left sequences of shape {tuple(given.shape)}, {given.dtype} on {given.device}, expected "
                f"{tuple(own.shape)}, {own.dtype} on {own.device}"
            )
        is_mask = given.gather(1, self.positions) == self.mask_token_id  # (b, g)
        if (is_mask & ~self.masked).any():
            raise ValueError(
                "on_step_end put masks where the answer has tokens already: the steps that are left are counted, so "
                "that nothing would fill those"
            )
        self.sequences, self.masked = given, is_mask
        return step.stop

    def _step(self, columns: slice, count: int | None) -> None:
        rows = self.masked[:, columns].any(1).nonzero()[:, 0]  # (a,); rows that are done with the block sit out
        positions, masked = self.positions[rows, columns], self.masked[rows, columns]  # (a, k)
        logits = self._guided_logits(rows, positions)  # (a, k, v)
        logits[..., self.mask_token_id] = float("-inf")
        tokens = sample_tokens(logits, self.sampling.temperature, self.random, rows)
        if self.sampling.remasking == "random":
            assert self.random is not None
            rank = self.random.uniform(rows, masked.shape[1])
        else:
            rank = confidence_of(logits, tokens)
        if count is None:
            chosen = above(rank, masked, self.sampling.confidence_threshold or 0.0)
        else:
            chosen = highest(rank, masked, count)
        current = self.sequences[rows].gather(1, positions)
        placed = self.sequences[rows].scatter(1, positions, torch.where(chosen, tokens, current))
        self.sequences = self.sequences.index_copy(0, rows, placed)
        self.masked[rows, columns] = masked & ~chosen

    def _guided_logits(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits (a, k, v) of `rows` (a,) at `positions` (a, k)."""
        w = self.sampling.cfg_scale
        sequences = self.sequences[rows]  # (a, l)
        self.forwards += 1
        if w == 0:
            return self._logits(rows, sequences, positions)
        prompt = torch.arange(sequences.shape[1], device=rows.device) < self.starts[rows, None]
        both = torch.cat([sequences, sequences.masked_fill(prompt, self.mask_token_id)])  # (2a, l)
        conditional, unconditional = self._logits(rows.repeat(2), both, positions.repeat(2, 1)).chunk(2)
        return unconditional + (w + 1) * (conditional - unconditional)

    def _logits(self, rows: torch.Tensor, sequences: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The logits of `sequences`, which are `rows` with or without their prompts, at the λ of these rows."""
        masked = torch.zeros_like(self.answer[rows]).scatter(1, self.positions[rows], self.masked[rows])
        share = self.masked[rows].float().mean(1)  # λ of each
        padding = {} if self.attention_mask is None else {"attention_mask": self.attention_mask[rows]}
        conditions = conditioned(self.model, share, masked=masked, answer=self.answer[rows])
        length = sequences.shape[1]
        with conditions, logits_at(self.model, positions, length) as selected:
            logits = logits_of(self.model(sequences, **padding))
        if not selected:
            logits = of_text(self.model, logits, length)
            logits = logits.gather(1, positions[..., None].expand(-1, -1, logits.shape[-1]))
        return logits.clone()

    def _finish_rows(self) -> None:
        """Fill the rest of each row whose first end token has no mask before it."""
        if not self.ends:
            return
        answers = self.answers
        is_end = torch.isin(answers, torch.tensor(self.ends, device=answers.device)) & ~self.masked  # (b, g)
        first = torch.where(is_end.any(1), is_end.int().argmax(1), self.sampling.gen_length)  # (b,)
        columns = torch.arange(self.sampling.gen_length, device=answers.device)
        done = is_end.any(1) & ~(self.masked & (columns < first[:, None])).any(1)  # (b,)
        rest = done[:, None] & (columns > first[:, None])  # (b, g)
        end = answers.gather(1, first.clamp(max=self.sampling.gen_length - 1)[:, None])  # (b, 1)
        self.sequences = self.sequences.scatter(1, self.positions, torch.where(rest, end, answers))
        self.masked = self.masked & ~rest

    def result(self) -> Generation:
        return Generation(self.sequences, self.answers, self.starts, self.forwards)


def _token_ids(ids: int | Sequence[int] | None) -> list[int]:
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)
