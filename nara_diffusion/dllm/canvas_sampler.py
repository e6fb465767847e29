"""Generate answers with DiffusionGemma, by transformers' own `generate`.

A canvas starts as `canvas_length` random tokens and becomes text step by step. Each step accepts
the most certain tokens, as long as the sum of their entropies stays below a bound, and redraws all
other tokens. The encoder then reads the finished canvas, and the next canvas uses the encoder's
cache. In the encoder, an adapter runs at λ = 0. In the decoder, λ is the share of the canvas that
the last step did not accept (`noise.canvas_source`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.diffusion_gemma.generation_diffusion_gemma import EntropyBoundSamplerConfig

from .block_loss import block_model
from .decoding import Sampling
from .models.backbone import evaluating
from .sampler import Generation

_OWN = ("gen_length", "steps", "block_length", "temperature", "entropy_bound")
"""The settings of `Sampling` that this sampler supports."""


def canvas_sampling(model: nn.Module, sampling: Sampling) -> Sampling:
    """Return `sampling` with the model's canvas as its block.

    Raises:
        ValueError: gen_length is not a multiple of the canvas length, block_length differs from the
            canvas length, or this sampler doesn't support a setting.
    """
    canvas: Any = block_model(model).config.canvas_length
    for name, value in sampling.changed().items():
        if name not in _OWN:
            raise ValueError(
                f"{name} is {value!r}, which DiffusionGemma's sampler doesn't take: it takes "
                f"{', '.join(_OWN)}."
            )
    if sampling.block_length not in (None, canvas) or sampling.gen_length % canvas:
        raise ValueError(
            f"gen_length is {sampling.gen_length} and block_length {sampling.block_length}, and the "
            f"model's canvas has {canvas} positions: give a multiple of it, and no block_length."
        )
    return Sampling(**{**vars(sampling), "block_length": canvas})


@torch.no_grad()
def answer_canvases(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    eos_token_id: Sequence[int],
    generator: torch.Generator | None = None,
    chat: bool = False,
    **settings: Any,
) -> Generation:
    """Answer prompts of unequal length, given as lists of token ids.

    Args:
        model: the outermost module around a DiffusionGemmaForBlockDiffusion.
        eos_token_id: the tokens that end an answer.
        generator: the generator that seeds the random numbers; None means torch's own.
        chat: has no effect, since this sampler uses the same settings for a chat.
        **settings: settings of `Sampling`. By default a canvas has as many steps as positions. A
            temperature of 0 selects the model's own temperatures.
    """
    inner = block_model(model)
    sampling = canvas_sampling(model, Sampling(**settings))
    options: dict[str, Any] = {"max_denoising_steps": len(sampling.tokens_per_step())}
    if sampling.temperature:
        hottest = math.nextafter(sampling.temperature, math.inf)  # t_max has to be higher
        options |= {"t_min": sampling.temperature, "t_max": hottest}
    if sampling.entropy_bound is not None:
        options["sampler_config"] = EntropyBoundSamplerConfig(float(sampling.entropy_bound))
    padding = eos_token_id[0]
    input_ids, mask = _padded_on_the_left(prompts, padding, inner.device)
    calls: list[int] = []
    counter = inner.model.decoder.register_forward_pre_hook(lambda *_: calls.append(1))
    devices = [inner.device] if inner.device.type == "cuda" else []
    try:
        with evaluating(inner), torch.random.fork_rng(devices, enabled=generator is not None):
            if generator is not None:
                source = generator.device
                seed = torch.randint(2**62, (), generator=generator, device=source)
                torch.manual_seed(int(seed))
            generate: Any = inner.generate
            sequences: Tensor = generate(
                input_ids,
                attention_mask=mask,
                max_new_tokens=sampling.gen_length,
                eos_token_id=list(eos_token_id),
                pad_token_id=padding,
                return_dict_in_generate=False,
                **options,
            )
    finally:
        counter.remove()
    width = input_ids.shape[1]
    rest = (0, width + sampling.gen_length - sequences.shape[1])  # it ended early
    sequences = torch.nn.functional.pad(sequences, rest, value=padding)
    starts = torch.full((len(prompts),), width, device=inner.device)
    return Generation(sequences, sequences[:, width:], starts, len(calls))


def _padded_on_the_left(
    prompts: Sequence[Sequence[int]], padding: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the padded prompts and their attention mask, each (b, p)."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), padding, device=device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.as_tensor(prompt, device=device)
        mask[row, width - len(prompt) :] = 1
    return ids, mask
