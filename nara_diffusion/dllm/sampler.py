"""Generate answers: `generate` checks the arguments, and the model's kind fills the answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from .decoding import Sampling
from .kinds import kind_of
from .masked_sampler import Generation, GenerationStep
from .models.backbone import Backbone, evaluating, without_ddp


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
            default is True if the model's attention is by blocks (LLaDA2, SDAR, …): they then never
            change. DiffusionGemma always has its cache.
        on_step_end: a function that is called after each step with a `GenerationStep`, which the
            function may change.
        **settings: settings of `nara_diffusion.dllm.Sampling`: gen_length (128), steps,
            block_length, temperature, top_p, cfg_scale, remasking, confidence_threshold, factor,
            entropy_bound, logits_eos_inf, confidence_eos_eot_inf, cache. DiffusionGemma takes gen_length,
            steps, temperature and entropy_bound.

    Returns:
        (b, longest prompt + gen_length) int64 token ids: prompt, answer, padding on the right.

    Raises:
        ValueError: an argument is invalid, a prompt contains the mask token, it is empty and the
            model predicts the next token (Dream), the canvas is longer than the model's positions,
            there is a cache but no attention by blocks, the adapter was trained with a λ that isn't
            the masked share (for LLaDA2, that of each block), or DiffusionGemma's sampler doesn't
            support a setting.
    """
    is_tensor = isinstance(input_ids, torch.Tensor)
    if not is_tensor or input_ids.ndim != 2 or input_ids.is_floating_point():
        raise ValueError(
            f"input_ids is a {type(input_ids).__name__}, expected a tensor (b, p) of token ids: "
            "torch.tensor(encode_prompts(tokenizer, [text])) makes one; LLaDAPipeline takes a text"
        )
    backbone = Backbone(without_ddp(model))
    kind = kind_of(backbone)
    if eos_token_id is None:
        eos_token_id = backbone.configured("eos_token_id")
    if pad_token_id is None:
        pad_token_id = backbone.configured("pad_token_id")
    with evaluating(backbone.model):
        generation = kind.generate(
            backbone,
            kind.sampling(backbone, Sampling(**settings), chat),
            input_ids=input_ids,
            prompt_lengths=prompt_lengths,
            attention_mask=attention_mask,
            mask_token_id=mask_token_id,
            eos_token_id=eos_token_id,
            stop_at_eos=stop_at_eos,
            pad_token_id=pad_token_id,
            generator=generator,
            use_cache=use_cache,
            on_step_end=on_step_end,
        )
    return generation if return_stats else generation.sequences


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
