"""LLaDA's semi-autoregressive sampler (arXiv 2502.09992, algorithms 4 and 5).

The answer starts as `gen_length` masks and is filled block by block, with the masks of later blocks
in sight. In each step the model predicts every mask of the block, and some get their tokens by the
rules of `decoding`. Classifier-free guidance combines logits as
(1 + w) · l(x) − w · l(x with its prompt masked).

A noise-aware model runs at λ = masked share of the answer over all blocks, for each sample in each
step, so λ goes from 1 to 0. Rows with masked prompts have the λ of their sample. There is no cache
of keys and values: with k or v adapted, it would belong to the λ of an older step. (`block_filling`
samples models with attention by blocks, with a cache.) Unlike LLaDA's code:

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

from .block_filling import fill_blocks
from .canvas import place_prompts
from .decoding import Sampling, model_sampling
from .models.backbone import Backbone, evaluating, without_ddp
from .unmasking import GenerationStep, State


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
        use_cache: keep keys and values of the prompt and of finished blocks; None does so if the
            model's attention goes by blocks (LLaDA2), where they never change.
        on_step_end: called after each step with a `GenerationStep`, which it may change.
        **settings: of `nara_diffusion.dllm.Sampling`: gen_length (128), steps, block_length,
            temperature, top_p, cfg_scale, remasking, confidence_threshold, factor, entropy_bound,
            logits_eos_inf, confidence_eos_eot_inf.

    Returns:
        (b, longest prompt + gen_length) int64 token ids: prompt, answer, padding on the right. An
        empty prompt becomes a BOS token if the model predicts the next token (Dream).

    Raises:
        ValueError: impossible arguments, a prompt that contains the mask token, more positions than
            the model has, a cache for a model without blocks, or an adapter that was trained with
            another λ than the masked share (LLaDA2: of each block).
    """
    is_tensor = isinstance(input_ids, torch.Tensor)
    if not is_tensor or input_ids.ndim != 2 or input_ids.is_floating_point():
        raise ValueError(
            f"input_ids is a {type(input_ids).__name__}, expected a tensor (b, p) of token ids: "
            "torch.tensor(encode_prompts(tokenizer, [text])) makes one; LLaDAPipeline takes a text"
        )
    backbone = Backbone(without_ddp(model))
    sampling = Sampling(**settings)
    if use_cache and backbone.block_length is None:
        raise ValueError(
            "use_cache=True, and this model sees the masks of later blocks: keys and values change "
            "with each token, and with λ; leave it out (LLaDA2 has attention by blocks)"
        )
    sampling = model_sampling(backbone.model, sampling, chat=chat)
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
    state = State(backbone, sampling, mask, *special, *placed, generator)
    with evaluating(backbone.model):
        if backbone.block_length is None:
            state.fill(on_step_end)
        else:
            fill_blocks(state, on_step_end, use_cache is not False)
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
