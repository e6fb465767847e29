"""LLaDA's semi-autoregressive sampler (arXiv 2502.09992, algorithms 4 and 5).

The answer starts as `gen_length` masks and is filled block by block, the later blocks' masks in sight. At each step the
model predicts every mask of the block, and some get their tokens: `decoding` has the rules. Classifier-free guidance
combines logits as (1 + w) · l(x) − w · l(x with its prompt masked).

A noise-aware model runs at λ = masked share of the answer, per sample, at each step, over all blocks, so it goes from
1 to 0; the guided half of a batch has the λ of its sample. There is no cache of keys and values: with k or v adapted,
what it holds would belong to the λ of an older step. What differs from LLaDA's own generate():

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
from functools import partial
from typing import Any

import torch
from torch import nn

from nara_diffusion.noise.rows import guidance_rows

from .canvas import place_prompts
from .conditioning import ForwardRows, conditioned
from .decoding import Sampling, chat_settings
from .models.backbone import Backbone, evaluating, guided, without_ddp


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


@torch.no_grad()
def generate(
    model: nn.Module,
    input_ids: torch.Tensor,
    *,
    prompt_lengths: torch.Tensor | Sequence[int] | None = None,
    attention_mask: torch.Tensor | None = None,
    chat: bool = False,
    generator: torch.Generator | None = None,
    mask_token_id: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    stop_at_eos: bool = True,
    pad_token_id: int | None = None,
    return_stats: bool = False,
    on_step_end: Callable[[GenerationStep], None] | None = None,
    **settings: Any,
) -> torch.Tensor | Generation:
    """Answer the prompts in `input_ids`.

    Args:
        model: the outermost module. Of a DistributedDataParallel its `.module` runs, since processes may need different
            numbers of steps; under FSDP and DeepSpeed ZeRO-3 give every process the same number (stop_at_eos=False
            and `steps`).
        input_ids: (b, p) prompts, of any integer type.
        prompt_lengths: (b,) of prompts padded on the right.
        attention_mask: (b, p), instead of `prompt_lengths`; padding may stand on either side.
        chat: whether the prompts come from the chat template: `block_length` is then by default that of the model's own
            chat (LLaDA: 32), if it divides `gen_length`.
        generator: seeds a stream of random numbers a row, for Gumbel noise and random remasking: what a row draws
            doesn't depend on the rows beside it, but for its place among them.
        mask_token_id: by default that of the model's configuration.
        eos_token_id: one or several; by default those of the configuration.
        pad_token_id: by default that of the configuration.
        stop_at_eos: finish a row at its first eos token.
        return_stats: return a `Generation`, with the number of forwards, in place of the sequences.
        on_step_end: called after each step with a `GenerationStep`, which it may change.
        **settings: of `nara_diffusion.dllm.Sampling`: gen_length (128), steps, block_length, temperature, top_p,
            cfg_scale, remasking, confidence_threshold, factor, entropy_bound, logits_eos_inf, confidence_eos_eot_inf.

    Returns:
        (b, longest prompt + gen_length) int64 token ids: prompt, answer, and padding on the right of shorter rows. An
        empty prompt becomes a BOS token if the model predicts the next token (Dream).

    Raises:
        ValueError: impossible arguments, a prompt that holds the mask token, more positions than the model has, or an
            adapter that was trained with another λ than the masked share.
    """
    if (
        not isinstance(input_ids, torch.Tensor)
        or input_ids.ndim != 2
        or input_ids.is_floating_point()
    ):
        raise ValueError(
            f"input_ids is a {type(input_ids).__name__}, expected a tensor (b, p) of token ids: a text becomes one by "
            "torch.tensor(encode_prompts(tokenizer, [text])), and LLaDAPipeline takes it as it is"
        )
    backbone = Backbone(without_ddp(model))
    sampling = Sampling(**(chat_settings(backbone.model, settings) if chat else settings))
    mask, eos = backbone.mask_token_id(mask_token_id), backbone.configured("eos_token_id")
    padding = pad_token_id if pad_token_id is not None else backbone.configured("pad_token_id")
    lengths: dict[str, Any] = {"prompt_lengths": prompt_lengths, "attention_mask": attention_mask}
    padding = mask if padding is None else padding
    placed = place_prompts(backbone, input_ids, sampling.gen_length, mask, padding, **lengths)
    eos, ends = (
        torch.as_tensor(
            [] if ids is None else ids, dtype=torch.long, device=input_ids.device
        ).reshape(-1)
        for ids in (eos, eos if eos_token_id is None else eos_token_id)
    )
    never = torch.cat([eos if sampling.logits_eos_inf else eos[:0], eos.new_tensor([mask])])
    last = ends if sampling.confidence_eos_eot_inf else ends[:0]
    state = _State(
        backbone, sampling, mask, ends if stop_at_eos else ends[:0], last, never, *placed, generator
    )
    with evaluating(backbone.model):
        state.fill(on_step_end)
    result = Generation(state.sequences, state.answers, state.starts, state.forwards)
    return result if return_stats else result.sequences


@dataclass
class _State:
    """The state of the sampler: the sequences, and the step that fills some of their masks.

    Attributes:
        ends: (e,) the tokens that end an answer.
        last, never: the tokens that are placed after all others, and those that are never predicted.
        sequences, starts, real: what `place_prompts` returned.
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
    real: torch.Tensor
    generator: torch.Generator | None
    forwards: int = 0

    def __post_init__(self) -> None:
        self.attention_mask = None if self.real.all() else self.real.long()  # (b, l)
        self.columns = torch.arange(self.sampling.gen_length, device=self.starts.device)  # (g,)
        self.positions = self.starts[:, None] + self.columns  # (b, g)
        self.masked = torch.ones_like(self.positions, dtype=torch.bool)  # (b, g)
        if self.sampling.temperature > 0 or self.sampling.remasking == "random":
            source = "cpu" if self.generator is None else self.generator.device
            seeds = torch.randint(
                2**62, (len(self.starts),), generator=self.generator, device=source
            ).tolist()
            self.streams = [torch.Generator(self.starts.device).manual_seed(seed) for seed in seeds]

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
                    step = GenerationStep(
                        self.forwards - 1, noise_level, self.sequences.clone(), self.masked.clone()
                    )
                    on_step_end(step)
                    self.sequences = step.sequences
                    self.masked &= self.answers == self.mask_token_id
                    if step.stop:
                        return

    def _step(self, columns: slice, count: int) -> None:
        rows = (
            self.masked[:, columns].any(1).nonzero()[:, 0]
        )  # (a,); rows that are done with the block sit out
        positions, masked = self.positions[rows, columns], self.masked[rows, columns]  # (a, k)
        logits = self._logits(rows, positions).index_fill_(
            -1, self.never, float("-inf")
        )  # (a, k, v)
        tokens, chosen = self.sampling.place(
            logits, masked, count, self.last, partial(self._uniform, rows)
        )
        sequences = self.sequences[rows]
        placed = sequences.scatter(
            1, positions, torch.where(chosen, tokens, sequences.gather(1, positions))
        )
        self.sequences = self.sequences.index_copy(0, rows, placed)
        self.masked[rows, columns] = masked & ~chosen

    def _logits(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The guided logits (a, k, v) of `rows` (a,) at `positions` (a, k), each row at its own λ."""
        self.forwards += 1
        w = self.sampling.cfg_scale
        padding = None if self.attention_mask is None else self.attention_mask[rows]
        noise_level = self.masked[rows].float().mean(1)
        given = ForwardRows(self.sequences[rows], padding, noise_level)  # a rows
        if w > 0:
            columns = torch.arange(self.sequences.shape[1], device=rows.device)
            is_prompt = columns < self.starts[rows, None]  # (a, l)
            given = given.with_masked_prompts(is_prompt, self.mask_token_id)  # 2a rows
            positions = guidance_rows(positions)
        with conditioned(self.backbone.model, given.noise_level):
            logits = self.backbone.logits(given.input_ids, given.attention_mask, at=positions)
        return guided(logits.clone().unflatten(0, (-1, len(rows))), w)

    def _uniform(self, rows: torch.Tensor, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """The next random numbers of `rows` (a,), each from its own stream: (a, *shape)."""
        streams = [self.streams[row] for row in rows.tolist()]
        return torch.stack(
            [torch.rand(shape, dtype=dtype, device=s.device, generator=s) for s in streams]
        )

    def _finish_rows(self) -> None:
        """Fill the rest of each row whose first end token has no mask before it."""
        answers = self.answers
        is_end = torch.isin(answers, self.ends) & ~self.masked  # (b, g)
        first = torch.where(is_end.any(1), is_end.int().argmax(1), len(self.columns) - 1)[
            :, None
        ]  # (b, 1)
        done = is_end.any(1, keepdim=True) & ~(self.masked & (self.columns < first)).any(
            1, keepdim=True
        )
        rest = done & (self.columns > first)  # (b, g)
        filled = torch.where(rest, answers.gather(1, first), answers)
        self.sequences = self.sequences.scatter(1, self.positions, filled)
        self.masked = self.masked & ~rest
