"""LLaDA's semi-autoregressive sampler (arXiv 2502.09992, algorithms 4 and 5).

The answer starts as `gen_length` masks and is filled block by block, with the masks of later blocks
in sight. In each step the model predicts every mask of the block, and some get their tokens by the
rules of `decoding`. Classifier-free guidance combines logits as
(1 + w) · l(x) − w · l(x with its prompt masked).

A noise-aware model runs at λ = masked share of the answer over all blocks, for each sample in each
step, so λ goes from 1 to 0. Rows with masked prompts have the λ of their sample. There is no cache
of keys and values: with k or v adapted, it would belong to the λ of an older step. Unlike LLaDA's
code:

- an empty prompt becomes a BOS token if position i predicts token i + 1 (Dream), so that something
  predicts the first token of the answer; prompts may differ in length (`canvas`);
- the mask token is never predicted, so that a step cannot undo another;
- a row is done if no mask is left before its first end-of-sequence token: that token fills the rest
  of its answer. Sampling stops when all rows are done;
- steps without a token to place are skipped, and rows without one are left out. That changes
  nothing, since λ counts masks and not steps.

The host reads one thing a step, the rows of the block with a mask left: it waits for the device
there, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from nara_diffusion.noise.rows import guidance_rows

from .canvas import ForwardRows, conditioned, place_prompts
from .decoding import Sampling, chat_sampling
from .models.backbone import Backbone, evaluating, guided, without_ddp


@dataclass(frozen=True)
class Generation:
    """The result of `generate`.

    Attributes:
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
        model: the outermost module. Of a DistributedDataParallel its `.module` runs, since
            processes may need different numbers of steps. Under FSDP and DeepSpeed ZeRO-3 give
            every process the same number (stop_at_eos=False and `steps`).
        input_ids: (b, p) prompts, of any integer type.
        prompt_lengths: (b,) of prompts padded on the right.
        attention_mask: (b, p), instead of `prompt_lengths`; padding may be on either side.
        chat: True if the prompts come from the chat template: the default of `block_length` is then
            that of the model's own chat (LLaDA: 32), if it divides `gen_length`.
        generator: seeds a stream of random numbers for each row, for Gumbel noise and random
            remasking. A row's numbers don't depend on the rows beside it, only on its place among
            them.
        mask_token_id: None takes that of the model's configuration.
        pad_token_id: None takes that of the model's configuration.
        eos_token_id: one or several; by default those of the configuration.
        stop_at_eos: finish a row at its first eos token.
        return_stats: return a `Generation`, with the number of forwards, instead of the sequences.
        on_step_end: called after each step with a `GenerationStep`, which it may change.
        **settings: of `nara_diffusion.dllm.Sampling`: gen_length (128), steps, block_length,
            temperature, top_p, cfg_scale, remasking, confidence_threshold, factor, entropy_bound,
            logits_eos_inf, confidence_eos_eot_inf.

    Returns:
        (b, longest prompt + gen_length) int64 token ids: prompt, answer, padding on the right. An
        empty prompt becomes a BOS token if the model predicts the next token (Dream).

    Raises:
        ValueError: impossible arguments, a prompt that contains the mask token, more positions than
            the model has, or an adapter that was trained with another λ than the masked share.
    """
    is_tensor = isinstance(input_ids, torch.Tensor)
    if not is_tensor or input_ids.ndim != 2 or input_ids.is_floating_point():
        raise ValueError(
            f"input_ids is a {type(input_ids).__name__}, expected a tensor (b, p) of token ids: "
            "torch.tensor(encode_prompts(tokenizer, [text])) makes one; LLaDAPipeline takes a text"
        )
    backbone = Backbone(without_ddp(model))
    sampling = Sampling(**settings)
    if chat:
        sampling = chat_sampling(backbone.model, sampling)
    mask = backbone.mask_token_id(mask_token_id)
    configured = backbone.configured("pad_token_id")
    padding = configured if pad_token_id is None else pad_token_id
    placed = place_prompts(
        backbone,
        input_ids,
        sampling.gen_length,
        mask,
        mask if padding is None else padding,
        prompt_lengths=prompt_lengths,
        attention_mask=attention_mask,
    )
    configured = backbone.configured("eos_token_id")
    ends = _token_list(configured if eos_token_id is None else eos_token_id)
    never = [mask, *_token_list(configured)] if sampling.logits_eos_inf else [mask]
    tokens = partial(torch.tensor, dtype=torch.long, device=input_ids.device)
    last = ends if sampling.confidence_eos_eot_inf else []
    special = (tokens(ends if stop_at_eos else []), tokens(last), tokens(never))
    state = _State(backbone, sampling, mask, *special, *placed, generator)
    with evaluating(backbone.model):
        state.fill(on_step_end)
    if not return_stats:
        return state.sequences
    return Generation(state.sequences, state.answers, state.starts, state.forwards)


def _token_list(ids: int | Sequence[int] | None) -> list[int]:
    return [] if ids is None else torch.as_tensor(ids).reshape(-1).tolist()


def answer_prompts(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    device: torch.device | None = None,
    **sampling: Any,
) -> Generation:
    """Call `generate` for prompts of unequal length, as lists of token ids.

    By default they go to the `device` of the model's parameters.
    """
    lengths = [len(prompt) for prompt in prompts]
    rows = [torch.as_tensor(prompt, dtype=torch.long) for prompt in prompts]
    input_ids = pad_sequence(rows, batch_first=True).to(device or Backbone(model).device)
    result = generate(model, input_ids, prompt_lengths=lengths, return_stats=True, **sampling)
    assert isinstance(result, Generation)
    return result


@dataclass
class _State:
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
                self._finish_rows()
                if on_step_end is not None and self._is_stopped(on_step_end, noise_level):
                    return

    def _is_stopped(
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
        logits = self._logits(rows, positions)  # (a, k, v)
        logits = logits.index_fill_(-1, self.never, float("-inf"))
        uniform = partial(self._uniform, open_rows)
        tokens, chosen = self.sampling.place(logits, masked, count, self.last, uniform)
        sequences = self.sequences[rows]
        tokens = torch.where(chosen, tokens, sequences.gather(1, positions))
        placed = sequences.scatter(1, positions, tokens)
        self.sequences = self.sequences.index_copy(0, rows, placed)
        self.masked[rows, columns] = masked & ~chosen

    def _logits(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the guided logits (a, k, v) of `rows` (a,), each at its own λ, at `positions` (a,
        k)."""
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

    def _finish_rows(self) -> None:
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
