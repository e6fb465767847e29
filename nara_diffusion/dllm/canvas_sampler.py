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
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.models.diffusion_gemma.generation_diffusion_gemma import EntropyBoundSamplerConfig

from .decoding import Sampling
from .masked_sampler import Generation
from .models.backbone import Backbone
from .prompt_places import check_canvas, prompt_positions


def fill_canvases(
    backbone: Backbone,
    sampling: Sampling,
    input_ids: Tensor,
    *,
    prompt_lengths: Tensor | Sequence[int] | None,
    attention_mask: Tensor | None,
    eos_token_id: int | Sequence[int] | None,
    stop_at_eos: bool,
    pad_token_id: int | None,
    generator: torch.Generator | None,
    **unsupported: Any,
) -> Generation:
    """Answer prompts; see `generate`.

    Args:
        sampling: the settings, from `TextKind.sampling`. By default a canvas has as many steps as
            positions. A temperature of 0 selects the model's own temperatures.
        unsupported: arguments of `generate` that transformers' sampler doesn't have.

    Raises:
        ValueError: a prompt is empty, the canvas is longer than the model's positions, or an
            argument is unsupported.
    """
    refused = [name for name, value in unsupported.items() if not (value is None or value is True)]
    if refused:
        raise ValueError(
            f"{' and '.join(refused)} can't be given for DiffusionGemma: transformers' own generate "
            "fills its canvases, without masks and always with its cache; leave it out"
        )
    is_prompt = prompt_positions(input_ids, prompt_lengths, attention_mask)  # (b, p), on the CPU
    starts = is_prompt.sum(1)  # (b,)
    if not starts.all():
        raise ValueError("a prompt is empty, and DiffusionGemma needs one token or more, e.g. BOS")
    width = int(starts.max())
    check_canvas(backbone.model, width, sampling.gen_length)
    options: dict[str, Any] = {"max_denoising_steps": len(sampling.tokens_per_step())}
    if sampling.temperature:
        hottest = math.nextafter(sampling.temperature, math.inf)  # t_max has to be higher
        options |= {"t_min": sampling.temperature, "t_max": hottest}
    if sampling.entropy_bound is not None:
        options["sampler_config"] = EntropyBoundSamplerConfig(float(sampling.entropy_bound))
    pad, device = pad_token_id or 0, input_ids.device
    rows = [row[real] for row, real in zip(input_ids.cpu().long(), is_prompt, strict=True)]
    prompts = pad_sequence(rows, True, pad, padding_side="left")  # (b, width)
    real = torch.arange(width) >= width - starts[:, None]
    model: Any = backbone.language_model
    calls: list[int] = []
    counter = model.model.decoder.register_forward_pre_hook(lambda *_: calls.append(1))
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices, enabled=generator is not None):
            if generator is not None:
                source = generator.device
                seed = torch.randint(2**62, (), generator=generator, device=source)
                torch.manual_seed(int(seed))
            sequences: Tensor = model.generate(
                prompts.to(device),
                attention_mask=real.long().to(device),
                max_new_tokens=sampling.gen_length,
                eos_token_id=eos_token_id if stop_at_eos else None,
                pad_token_id=pad,
                return_dict_in_generate=False,
                **options,
            )
    finally:
        counter.remove()
    missing = (0, width + sampling.gen_length - sequences.shape[1])  # it ended early
    sequences = F.pad(sequences, missing, value=pad)
    answers = sequences[:, width:]
    shifts = (starts - width).tolist()
    rows = [row.roll(shift) for row, shift in zip(sequences, shifts, strict=True)]
    sequences = torch.stack(rows)  # padding on the right
    return Generation(sequences, answers, starts.to(device), len(calls))
