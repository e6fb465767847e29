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
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.models.diffusion_gemma.generation_diffusion_gemma import EntropyBoundSamplerConfig

from .canvas_loss import block_model
from .decoding import Sampling
from .sampling_state import Generation


def fill_canvases(
    model: nn.Module,
    input_ids: Tensor,
    is_prompt: Tensor,
    sampling: Sampling,
    end_token_ids: Sequence[int],
    pad_token_id: int,
    generator: torch.Generator | None = None,
) -> Generation:
    """Answer prompts.

    Args:
        model: the outermost module around a DiffusionGemmaForBlockDiffusion.
        input_ids: (b, p) prompts.
        is_prompt: (b, p) bool, on the CPU, False on padding.
        sampling: the settings, from `TextKind.sampling`. By default a canvas has as many steps as
            positions. A temperature of 0 selects the model's own temperatures.
        end_token_ids: the tokens that end an answer; none to fill all canvases.
        pad_token_id: the token around the texts, and after the end of an answer.
        generator: the generator that seeds the random numbers; None means torch's own.

    Raises:
        ValueError: a prompt is empty.
    """
    inner = block_model(model)
    options: dict[str, Any] = {"max_denoising_steps": len(sampling.tokens_per_step())}
    if sampling.temperature:
        hottest = math.nextafter(sampling.temperature, math.inf)  # t_max has to be higher
        options |= {"t_min": sampling.temperature, "t_max": hottest}
    if sampling.entropy_bound is not None:
        options["sampler_config"] = EntropyBoundSamplerConfig(float(sampling.entropy_bound))
    prompts, real = _padded_on_the_left(input_ids, is_prompt, pad_token_id)
    calls: list[int] = []
    counter = inner.model.decoder.register_forward_pre_hook(lambda *_: calls.append(1))
    devices = [inner.device] if inner.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices, enabled=generator is not None):
            if generator is not None:
                source = generator.device
                seed = torch.randint(2**62, (), generator=generator, device=source)
                torch.manual_seed(int(seed))
            generate: Any = inner.generate
            sequences: Tensor = generate(
                prompts,
                attention_mask=real,
                max_new_tokens=sampling.gen_length,
                eos_token_id=list(end_token_ids) or None,
                pad_token_id=pad_token_id,
                return_dict_in_generate=False,
                **options,
            )
    finally:
        counter.remove()
    width = prompts.shape[1]
    missing = (0, width + sampling.gen_length - sequences.shape[1])  # it ended early
    sequences = torch.nn.functional.pad(sequences, missing, value=pad_token_id)
    answers = sequences[:, width:]
    starts = is_prompt.sum(1)  # (b,)
    rows = zip(sequences, (starts - width).tolist(), strict=True)
    sequences = torch.stack([row.roll(shift) for row, shift in rows])  # padding on the right
    return Generation(sequences, answers, starts.to(sequences.device), len(calls))


def _padded_on_the_left(
    input_ids: Tensor, is_prompt: Tensor, pad_token_id: int
) -> tuple[Tensor, Tensor]:
    """Return the prompts with padding on the left and their attention mask, each (b, longest)."""
    if not is_prompt.any(1).all():
        raise ValueError("a prompt is empty, and DiffusionGemma needs one token or more, e.g. BOS")
    prompts = [row[real] for row, real in zip(input_ids.cpu().long(), is_prompt, strict=True)]
    ones = [torch.ones_like(prompt) for prompt in prompts]
    padded = partial(pad_sequence, batch_first=True, padding_side="left")
    real = padded(ones).to(input_ids.device)
    return padded(prompts, padding_value=pad_token_id).to(input_ids.device), real
