"""LLaDA's semi-autoregressive sampler (arXiv 2502.09992, algorithms 4 and 5).

The answer starts as `gen_length` masks and is filled block by block, the later blocks' masks in sight. At each step the
model predicts every mask of the block, and those that the remasking rule ranks highest are kept:

    low_confidence   rank by the probability of the predicted token
    random           rank by a uniform random number

either `steps` in all, spread evenly over the blocks and their tokens, or, with `confidence_threshold`, every token
whose probability exceeds it and one at least a step (parallel decoding, arXiv 2505.22618). Tokens are argmax(logits
/ T + Gumbel noise); classifier-free guidance combines logits as (1 + w) · l(x) − w · l(x with its prompt masked).

A noise-aware model runs at λ = masked share of the answer, per sample, at each step, over all blocks, so it goes from
1 to 0; the guided half of a batch has the λ of its sample. What differs from LLaDA's own generate():

- an empty prompt becomes a BOS token where position i predicts token i + 1 (Dream), so that something predicts the
  first token of the answer;
- prompts of unequal length, see `canvas`;
- the mask token is never predicted, so that a step cannot undo another;
- a row whose first end-of-sequence token has no mask before it is done: the rest of its answer is filled with that
  token. When all rows are done, sampling stops;
- steps that have no token to place are skipped, and rows that have none sit out. That changes nothing, since λ counts
  masks and not steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .canvas import Canvas, place_prompts
from .masked_share import conditioned
from .models.backbone import Backbone, evaluating, without_ddp

REMASKING = ("low_confidence", "random")


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
    noise_level: (b,) λ before this step, at which the model ran; rows that are done have 0.
    sequences: (b, l) prompt, answer so far, padding. A mask may be filled; no other token may become a mask.
    masked: (b, gen_length) which tokens of the answers are masks still.
    stop: True ends sampling after this step; masks that are left stay.
    """

    index: int
    noise_level: torch.Tensor
    sequences: torch.Tensor
    masked: torch.Tensor
    stop: bool = False


@dataclass(frozen=True)
class Sampling:
    """The settings of `generate`.

    Raises:
        ValueError: a value is out of its range, or two settings contradict each other.
    """

    gen_length: int
    steps: int | None = None
    block_length: int | None = None
    temperature: float = 0.0
    cfg_scale: float = 0.0
    remasking: str = "low_confidence"
    confidence_threshold: float | None = None

    def __post_init__(self) -> None:
        if self.block < 1 or self.gen_length < 1 or self.gen_length % self.block:
            raise ValueError(f"block_length {self.block} doesn't divide gen_length {self.gen_length}, as it has to")
        blocks = self.gen_length // self.block
        if self.steps is not None and (self.steps < blocks or self.steps % blocks):
            raise ValueError(
                f"steps is {self.steps} and there are {blocks} blocks: pass a multiple of {blocks}, e.g. {blocks} or "
                f"{self.gen_length}"
            )
        for name in ("temperature", "cfg_scale"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 or more")
        if self.remasking not in REMASKING:
            raise ValueError(f"remasking is {self.remasking!r}, expected one of {', '.join(map(repr, REMASKING))}")
        if self.confidence_threshold is not None and (self.steps is not None or self.remasking != "low_confidence"):
            raise ValueError(
                "confidence_threshold decides itself how many tokens a step places, by their confidence: leave out "
                "steps, and use remasking='low_confidence'"
            )

    @property
    def block(self) -> int:
        """The number of tokens of a block."""
        return self.gen_length if self.block_length is None else self.block_length

    def tokens_per_step(self) -> list[int | None]:
        """The number of tokens that each step of a block fills, in descending order; None if confidence decides."""
        if self.confidence_threshold is not None:
            return [None] * self.block
        steps = (self.steps or self.gen_length) // (self.gen_length // self.block)
        whole, rest = divmod(self.block, steps)
        return [whole + (step < rest) for step in range(steps)]


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
        ValueError: impossible arguments, a prompt that holds the mask token, more positions than the model has, or an
            adapter that was trained with another λ than the masked share.
    """
    sampling = Sampling(gen_length, steps, block_length, temperature, cfg_scale, remasking, confidence_threshold)
    backbone = Backbone(without_ddp(model))
    mask = backbone.mask_token_id(mask_token_id)
    padding = pad_token_id if pad_token_id is not None else backbone.configured("pad_token_id")
    ends = eos_token_id if eos_token_id is not None else backbone.configured("eos_token_id")
    canvas = place_prompts(
        backbone,
        input_ids,
        gen_length,
        mask_token_id=mask,
        pad_token_id=mask if padding is None else padding,
        prompt_lengths=prompt_lengths,
        attention_mask=attention_mask,
    )
    state = _State(backbone, canvas, sampling, mask, generator)
    if stop_at_eos and ends is not None:
        state.ends = torch.as_tensor(ends, device=input_ids.device).reshape(-1)
    with evaluating(backbone.model):
        state.fill(on_step_end)
    result = Generation(state.sequences, state.answers, state.starts, state.forwards)
    return result if return_stats else result.sequences


class _State:
    """The state of the sampler: the sequences, and the step that fills some of their masks."""

    def __init__(
        self, backbone: Backbone, canvas: Canvas, sampling: Sampling, mask: int, generator: torch.Generator | None
    ) -> None:
        self.backbone, self.sampling, self.mask_token_id = backbone, sampling, mask
        self.sequences, self.starts = canvas.sequences, canvas.starts
        self.ends = self.starts.new_empty(0)  # the tokens that end an answer
        self.attention_mask = None if canvas.real.all() else canvas.real.long()  # (b, l)
        self.columns = torch.arange(sampling.gen_length, device=self.starts.device)  # (g,)
        self.positions = self.starts[:, None] + self.columns  # (b, g)
        self.masked = torch.ones_like(self.positions, dtype=torch.bool)  # (b, g)
        self.answer = torch.zeros_like(canvas.real).scatter(1, self.positions, True)  # (b, l)
        self.streams: list[torch.Generator] = []  # one a row
        if sampling.temperature > 0 or sampling.remasking == "random":
            source = "cpu" if generator is None else generator.device
            seeds = torch.randint(2**62, (len(self.starts),), generator=generator, device=source).tolist()
            self.streams = [torch.Generator(self.starts.device).manual_seed(seed) for seed in seeds]
        self.forwards = 0

    @property
    def answers(self) -> torch.Tensor:
        """(b, g) token ids."""
        return self.sequences.gather(1, self.positions)

    def fill(self, on_step_end: Callable[[GenerationStep], None] | None) -> None:
        """Fill all masks, block by block."""
        for start in range(0, self.sampling.gen_length, self.sampling.block):
            columns = slice(start, start + self.sampling.block)
            for count in self.sampling.tokens_per_step():
                if count == 0 or not self.masked[:, columns].any():
                    continue
                noise_level = self.masked.float().mean(1)  # (b,)
                self._step(columns, count)
                self._finish_rows()
                if on_step_end is not None:
                    step = GenerationStep(self.forwards - 1, noise_level, self.sequences.clone(), self.masked.clone())
                    on_step_end(step)
                    self.sequences = step.sequences
                    self.masked &= self.answers == self.mask_token_id
                    if step.stop:
                        return

    def _step(self, columns: slice, count: int | None) -> None:
        rows = self.masked[:, columns].any(1).nonzero()[:, 0]  # (a,); rows that are done with the block sit out
        positions, masked = self.positions[rows, columns], self.masked[rows, columns]  # (a, k)
        logits = self._logits(rows, positions)  # (a, k, v)
        logits[..., self.mask_token_id] = float("-inf")
        tokens = self._sampled(logits, rows)
        if self.sampling.remasking == "random":
            rank = self._uniform(rows, masked.shape[1], dtype=torch.float32)
        else:
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            rank = (wide.gather(-1, tokens[..., None])[..., 0] - wide.logsumexp(-1)).exp()  # the probability of each
        best = rank.masked_fill(~masked, float("-inf")).topk(min(count or 1, masked.shape[1]), dim=1).indices
        chosen = torch.zeros_like(masked).scatter(1, best, True)
        if count is None:
            chosen |= rank > (self.sampling.confidence_threshold or 0.0)
        chosen &= masked
        sequences = self.sequences[rows]
        placed = sequences.scatter(1, positions, torch.where(chosen, tokens, sequences.gather(1, positions)))
        self.sequences = self.sequences.index_copy(0, rows, placed)
        self.masked[rows, columns] = masked & ~chosen

    def _logits(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The guided logits (a, k, v) of `rows` (a,) at `positions` (a, k), each row at its own λ."""
        w, sequences = self.sampling.cfg_scale, self.sequences[rows]  # (a, l)
        self.forwards += 1
        if w > 0:
            prompt = torch.arange(sequences.shape[1], device=rows.device) < self.starts[rows, None]
            sequences = torch.cat([sequences, sequences.masked_fill(prompt, self.mask_token_id)])  # (2a, l)
            rows, positions = rows.repeat(2), positions.repeat(2, 1)
        answer = self.answer[rows]
        masked = torch.zeros_like(answer).scatter(1, self.positions[rows], self.masked[rows])
        padding = None if self.attention_mask is None else self.attention_mask[rows]
        with conditioned(self.backbone.model, self.masked[rows].float().mean(1), masked=masked, answer=answer):
            logits = self.backbone.logits(sequences, padding, at=positions).clone()
        if w > 0:
            conditional, unconditional = logits.chunk(2)
            return unconditional + (w + 1) * (conditional - unconditional)
        return logits

    def _sampled(self, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Tokens (a, k) of `rows` (a,) from logits (a, k, v): the argmax at temperature 0, else from softmax(logits/T).

        The draw is the argmax of logits / T + Gumbel noise, in float64: in lower precision the noise has too few
        values, and samples get visibly worse (arXiv 2409.02908).
        """
        if self.sampling.temperature == 0:
            return logits.argmax(-1)
        uniform = self._uniform(rows, *logits.shape[1:], dtype=torch.float64)
        gumbel = -torch.log(-torch.log(uniform.clamp(min=torch.finfo(torch.float64).tiny)))
        return (logits.double() / self.sampling.temperature + gumbel).argmax(-1)

    def _uniform(self, rows: torch.Tensor, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """The next random numbers of `rows` (a,), each from its own stream: (a, *shape)."""
        streams = [self.streams[row] for row in rows.tolist()]
        return torch.stack([torch.rand(shape, dtype=dtype, device=s.device, generator=s) for s in streams])

    def _finish_rows(self) -> None:
        """Fill the rest of each row whose first end token has no mask before it."""
        answers = self.answers
        is_end = torch.isin(answers, self.ends) & ~self.masked  # (b, g)
        first = torch.where(is_end.any(1), is_end.int().argmax(1), len(self.columns) - 1)[:, None]  # (b, 1)
        done = is_end.any(1, keepdim=True) & ~(self.masked & (self.columns < first)).any(1, keepdim=True)
        rest = done & (self.columns > first)  # (b, g)
        filled = torch.where(rest, answers.gather(1, first), answers)
        self.sequences = self.sequences.scatter(1, self.positions, filled)
        self.masked = self.masked & ~rest
