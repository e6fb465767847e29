"""LLaDA's semi-autoregressive sampler (arXiv 2502.09992, algorithms 4 and 5), and its canvas.

The canvas is a prompt followed by `gen_length` masks. It is filled block by block, and the model
also sees the masks of later blocks. In each step the model predicts every mask of the block, and
the rules of `decoding` choose which of them to fill. Classifier-free guidance combines logits as
(1 + w) · l(x) − w · l(x with its prompt masked).

In each step, a noise-aware model runs each sample at λ, the masked share of the whole answer, which
goes from 1 to 0. Rows with masked prompts have the λ of their sample. There is no cache of keys and
values, since adapted keys or values would belong to the λ of an earlier step. (`block_filling` uses
a cache for models with attention by blocks.) The differences from LLaDA's code are:

- An empty prompt becomes a BOS token if position i predicts token i + 1 (Dream). Otherwise no
  position would predict the first token of the answer.
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
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from nara_diffusion.noise.rows import guidance_rows

from .block_filling import fill_blocks
from .canvas_sampler import fill_canvases
from .decoding import Generation, GenerationStep, Sampling, State, model_sampling
from .models.backbone import (
    Backbone,
    ForwardRows,
    conditioned,
    evaluating,
    guided,
    without_ddp,
)
from .tokenizer import mask_in_a_text

_MAX_LENGTH = 512


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
    use_cache: bool | None = None,
    on_step_end: Callable[[GenerationStep], None] | None = None,
    **settings: Any,
) -> torch.Tensor | Generation:
    """Answer the prompts in `input_ids`.

    DiffusionGemma is sampled by transformers' own `generate` (`canvas_sampler`), with its cache.

    Args:
        model: the outermost module. For a DistributedDataParallel, its `.module` is called, since
            processes may need different numbers of steps. Under FSDP and DeepSpeed ZeRO-3, all
            processes need the same number: set stop_at_eos=False and `steps`.
        input_ids: (b, p) prompts, of any integer type.
        prompt_lengths: (b,) the lengths of prompts that are padded on the right.
        attention_mask: (b, p), instead of `prompt_lengths`. Padding may be on either side.
        chat: True if the prompts come from the chat template. The default of `block_length` is then
            the published value for the model's chat (LLaDA: 32), if it divides `gen_length`.
        generator: the generator that seeds a stream of random numbers for each row, for Gumbel
            noise and random remasking. The numbers depend on the index of the row in the batch, but
            not on the other rows. For DiffusionGemma, it seeds one stream for the whole batch.
        mask_token_id: the mask token; by default that of the model's configuration.
        pad_token_id: the padding token; by default that of the model's configuration.
        eos_token_id: one or several end tokens; by default those of the configuration.
        stop_at_eos: True to finish a row at its first end token.
        return_stats: True to return a `Generation`, with the number of forwards.
        use_cache: True to keep the keys and values of the prompt and of finished blocks. The
            default is True if the model's attention is by blocks (LLaDA2), since they then never
            change. DiffusionGemma always has its cache.
        on_step_end: a function that is called after each step with a `GenerationStep`, which the
            function may change.
        **settings: settings of `nara_diffusion.dllm.Sampling`: gen_length (128), steps,
            block_length, temperature, top_p, cfg_scale, remasking, confidence_threshold, factor,
            entropy_bound, logits_eos_inf, confidence_eos_eot_inf. DiffusionGemma takes gen_length,
            steps, temperature and entropy_bound.

    Returns:
        (b, longest prompt + gen_length) int64 token ids: prompt, answer, padding on the right. An
        empty prompt becomes a BOS token if the model predicts the next token (Dream).

    Raises:
        ValueError: an argument is invalid, a prompt contains the mask token, the canvas is longer
            than the model's positions, there is a cache but no attention by blocks or no λ for
            each block in training, the adapter was trained with a λ that isn't the masked share
            (for LLaDA2, that of each block), or DiffusionGemma's sampler doesn't support a setting.
    """
    is_tensor = isinstance(input_ids, torch.Tensor)
    if not is_tensor or input_ids.ndim != 2 or input_ids.is_floating_point():
        raise ValueError(
            f"input_ids is a {type(input_ids).__name__}, expected a tensor (b, p) of token ids: "
            "torch.tensor(encode_prompts(tokenizer, [text])) makes one; LLaDAPipeline takes a text"
        )
    backbone = Backbone(without_ddp(model))
    sampling = model_sampling(backbone.model, Sampling(**settings), chat=chat)
    configured = _token_list(backbone.configured("eos_token_id"))
    ends = configured if eos_token_id is None else _token_list(eos_token_id)
    stops = ends if stop_at_eos else []
    if pad_token_id is None:
        pad_token_id = backbone.configured("pad_token_id")
    prompts = {"prompt_lengths": prompt_lengths, "attention_mask": attention_mask}
    if backbone.has_canvas:
        _check_canvas_options(use_cache, mask_token_id=mask_token_id, on_step_end=on_step_end)
        is_prompt = _prompt_positions(input_ids, **prompts)
        check_canvas(backbone.model, int(is_prompt.sum(1).max()), sampling.gen_length)
        padding = 0 if pad_token_id is None else pad_token_id
        filled = fill_canvases(
            backbone.model, input_ids, is_prompt, sampling, stops, padding, generator
        )
        return filled if return_stats else filled.sequences
    if use_cache and backbone.block_length is None:
        raise ValueError(
            "use_cache=True, and this model sees the masks of later blocks: keys and values change "
            "with each token, and with λ; leave it out (LLaDA2 has attention by blocks)"
        )
    mask = backbone.mask_token_id(mask_token_id)
    padding = mask if pad_token_id is None else pad_token_id
    placed = place_prompts(backbone, input_ids, sampling.gen_length, mask, padding, **prompts)
    never = [mask, *configured] if sampling.logits_eos_inf else [mask]
    tokens = partial(torch.tensor, dtype=torch.long, device=input_ids.device)
    last = ends if sampling.confidence_eos_eot_inf else []
    special = (tokens(stops), tokens(last), tokens(never))
    state = State(backbone, sampling, mask, *special, *placed, generator)
    with evaluating(backbone.model):
        if backbone.block_length is None:
            state.fill(WholeText(), on_step_end)
        else:
            fill_blocks(state, on_step_end, use_cache is not False)
    if not return_stats:
        return state.sequences
    return Generation(state.sequences, state.answers, state.starts, state.forwards)


class WholeText:
    """Read all of a text at each step, with guidance. λ is the masked share of the answer."""

    def blocks(self, state: State) -> Iterable[torch.Tensor]:
        return state.positions.split(state.sampling.block, dim=1)

    def level(self, state: State, positions: torch.Tensor) -> torch.Tensor:
        return state.masked.float().mean(1)

    def logits(
        self, state: State, rows: torch.Tensor, positions: torch.Tensor, level: torch.Tensor
    ) -> torch.Tensor:
        w, positions = state.sampling.cfg_scale, positions[rows]
        padding = None if state.attention_mask is None else state.attention_mask[rows]
        given = ForwardRows(state.sequences[rows], padding, level[rows])  # a rows
        if w > 0:
            columns = torch.arange(state.sequences.shape[1], device=rows.device)
            is_prompt = columns < state.starts[rows, None]  # (a, l)
            given = given.with_masked_prompts(is_prompt, state.mask_token_id)  # 2a rows
            positions = guidance_rows(positions)
        with conditioned(state.backbone.model, given.noise_level):
            logits = state.backbone.logits(given.input_ids, given.attention_mask, at=positions)
        return guided(logits.unflatten(0, (-1, len(rows))), w)


def _check_canvas_options(use_cache: bool | None, **without: object) -> None:
    """Raise ValueError for an argument of `generate` that DiffusionGemma's sampler doesn't take."""
    given = [name for name, value in without.items() if value is not None]
    given += ["use_cache=False"] if use_cache is False else []
    if given:
        raise ValueError(
            f"{' and '.join(given)} can't be given for DiffusionGemma: transformers' own generate "
            "fills its canvases, without masks and always with its cache; leave it out"
        )


def _token_list(ids: int | Sequence[int] | None) -> list[int]:
    return [] if ids is None else torch.as_tensor(ids).reshape(-1).tolist()


def answer_prompts(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    device: torch.device | None = None,
    **sampling: Any,
) -> Generation:
    """Call `generate` for prompts of unequal length, given as lists of token ids.

    The default `device` is that of the model's parameters.
    """
    lengths = [len(prompt) for prompt in prompts]
    rows = [torch.as_tensor(prompt, dtype=torch.long) for prompt in prompts]
    input_ids = pad_sequence(rows, batch_first=True).to(device or Backbone(model).device)
    result = generate(model, input_ids, prompt_lengths=lengths, return_stats=True, **sampling)
    assert isinstance(result, Generation)
    return result


# ---------------------------------------------------------------- the canvas


def place_prompts(
    backbone: Backbone,
    input_ids: Tensor,
    gen_length: int,
    mask_token_id: int,
    pad_token_id: int,
    *,
    prompt_lengths: Tensor | Sequence[int] | None = None,
    attention_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Put `gen_length` masks after each prompt.

    An empty prompt becomes a BOS token if the model needs one. Everything is checked and placed on
    the CPU, and then moved to the device of `input_ids`.

    The arguments are those of `generate`.

    Returns:
        The token ids (b, l) int64 of prompt, masks and padding, with l the longest prompt +
        gen_length. The starts (b,) of the answers. The attention mask (b, l) int64, 0 on padding,
        or None if nothing is padded.

    Raises:
        ValueError: the shapes don't agree, the canvas is longer than the model's positions, or a
            prompt contains the mask token.
    """
    device = input_ids.device
    input_ids = input_ids.cpu().long()
    is_prompt = _prompt_positions(input_ids, prompt_lengths, attention_mask)  # (b, p)
    _check_mask_token(input_ids, is_prompt, mask_token_id)
    empty = ~is_prompt.any(1)  # (b,)
    opening = backbone.opening_token() if empty.any() else None
    if opening is not None:
        input_ids = F.pad(input_ids, (1, 0), value=opening)  # (b, 1 + p)
        is_prompt = torch.cat([empty[:, None], is_prompt], 1)
    starts = is_prompt.sum(1)  # (b,)
    longest_prompt = int(starts.max())
    check_canvas(backbone.model, longest_prompt, gen_length)
    length = longest_prompt + gen_length
    positions = torch.arange(length)
    real = positions < starts[:, None] + gen_length  # (b, l)
    sequences = torch.full((len(input_ids), length), pad_token_id)
    sequences[real] = mask_token_id
    # both sides go through the rows in order, and through the tokens of each row in order
    sequences[positions < starts[:, None]] = input_ids[is_prompt]
    padding = None if real.all() else real.long().to(device, non_blocking=True)
    sequences = sequences.to(device, non_blocking=True)
    return sequences, starts.to(device, non_blocking=True), padding


def _prompt_positions(
    input_ids: Tensor,
    prompt_lengths: Tensor | Sequence[int] | None,
    attention_mask: Tensor | None,
) -> Tensor:
    """Return the mask (b, p) bool, on the CPU, of tokens that belong to prompts."""
    if prompt_lengths is not None and attention_mask is not None:
        raise ValueError("prompt_lengths and attention_mask say the same: pass one of them")
    if attention_mask is not None:
        return attention_mask.cpu().bool()
    b, p = input_ids.shape
    given = p if prompt_lengths is None else prompt_lengths
    lengths = torch.as_tensor(given).cpu().expand(b)
    if (lengths < 0).any() or (lengths > p).any():
        raise ValueError(
            f"prompt_lengths is {lengths.tolist()}, expected {b} lengths between 0 and {p}"
        )
    return torch.arange(p) < lengths[:, None]


def _check_mask_token(input_ids: Tensor, is_prompt: Tensor, mask_token_id: int) -> None:
    """Raise ValueError if a prompt contains the mask token."""
    holding = (is_prompt & (input_ids == mask_token_id)).any(1)  # (b,)
    if holding.any():
        name = "the prompt" if len(input_ids) == 1 else f"prompt {int(holding.nonzero()[0])}"
        raise ValueError(f"{name} {mask_in_a_text(mask_token_id)}")


# ---------------------------------------------------------------- lengths


def check_positions(model: nn.Module, length: int, what: str, remedy: str) -> None:
    """Raise ValueError if `length` tokens exceed the model's positions: `what`, …: `remedy`."""
    limit = Backbone(model).position_limit
    if limit is not None and length > limit:
        raise ValueError(f"{what}, but the model has {limit} positions: {remedy}")


def check_canvas(model: nn.Module, longest_prompt: int, gen_length: int, record: str = "") -> None:
    """Raise ValueError if a canvas exceeds the model's positions.

    Args:
        record: the name of the record with the longest prompt, for messages.
    """
    length = longest_prompt + gen_length
    left = (Backbone(model).position_limit or 0) - gen_length
    remedy = "lower gen_length, or take shorter prompts and conversations"
    if record and left > 0:
        remedy += f" (the longest is {record}); --max_prompt_length {left} leaves longer ones out"
    what = f"the longest prompt has {longest_prompt} tokens and gen_length is {gen_length}"
    check_positions(model, length, f"{what}, together {length}", remedy)


def checked_lengths(model: nn.Module, max_length: int | None, gen_length: int) -> int:
    """Return the `max_length` of a training run.

    The default is 512, or the number of the model's positions if there are fewer.

    Raises:
        ValueError: `max_length` or `gen_length` exceeds the model's positions.
    """
    what = f"gen_length is {gen_length}"
    remedy = "lower it, since prompt and answer share them"
    check_positions(model, gen_length + 1, what, remedy)
    if max_length is None:
        return min(_MAX_LENGTH, Backbone(model).position_limit or _MAX_LENGTH)
    remedy = "lower it; longer answers are cut"
    check_positions(model, max_length, f"max_length is {max_length}", remedy)
    return max_length
