"""The rows of a forward, and the λ that a model with an adapter runs each of them at.

λ is the masked share of an answer. This package's losses and samplers set it at each forward:

    if cfg_scale > 0:
        rows = rows_of_guidance(*rows, is_prompt, mask_token_id)
    input_ids, attention_mask, noise_level = rows
    with conditioned(model, noise_level):
        …

Other people's samplers don't. There, λ is read from `input_ids`. A forward's arguments don't say
where the prompts end, so give that once:

    with read_noise_from_input_ids(model, prompt_lengths=[12, 30]):
        somebody_elses_generate(model, …)

Inside it, `noise_level(model, …)` still takes precedence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from nara_diffusion.noise.context import core_holders, find_holders, noise_level
from nara_diffusion.noise.rows import Repetition, guidance_rows
from nara_diffusion.noise.sources import (
    InputIdsNoise,
    set_noise_source,
)

from .backbone import Backbone


def guided(logits: Tensor, scale: float) -> Tensor:
    """Return classifier-free guidance, (1 + w) · l − w · l̃, of `logits` (2, …): l, and l̃.

    l̃ are the logits with the prompt masked. One set of logits (1, …) is returned unchanged.
    """
    if len(logits) == 1:
        return logits[0]
    conditional, unconditional = logits
    return unconditional + (scale + 1) * (conditional - unconditional)


def rows_of_guidance(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    noise_level: Tensor,
    is_prompt: Tensor,
    mask_token_id: int,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the 2b rows of classifier-free guidance: b rows, then the same with masked prompts.

    Args:
        input_ids: (b, l).
        attention_mask: (b, l); None if there is no padding.
        noise_level: λ of each row, (b,), or of its k blocks, (b, k).
        is_prompt: (b, l) bool.
    """
    masked = input_ids.masked_fill(is_prompt, mask_token_id)
    padding = None if attention_mask is None else guidance_rows(attention_mask)
    return torch.cat([input_ids, masked]), padding, guidance_rows(noise_level)


def conditioned(model: nn.Module, level: Tensor) -> AbstractContextManager:
    """Return the context `noise_level(model, λ)`; one that does nothing if no adapter needs λ.

    Adapters without a `noise_convention` get the one of the model.

    Args:
        model: the outermost module.
        level: λ of each row, (b,) float32, or of its k blocks, (b, k).

    Raises:
        ValueError: an adapter that needs λ was trained with another definition of it.
    """
    noisy = {holder: holder.noisy(holder.active_names()) for holder in find_holders(model)}
    if not any(names or holder.merging.binds_level for holder, names in noisy.items()):
        return nullcontext()
    convention = Backbone(model).traits.noise_convention
    for holder, names in noisy.items():
        for name, other in holder.finder.adopt_convention(names, convention).items():
            raise ValueError(
                f"Adapter '{name}' was trained with λ defined as {other!r}, and this is "
                f"{convention!r}, a share of the answer's tokens: use an adapter that was trained "
                "with that, or call the model yourself inside `with noise_level(model, value):`."
            )
    return noise_level(model, level)


@contextmanager
def read_noise_from_input_ids(
    model: nn.Module,
    prompt_lengths: int | Sequence[int] | Tensor,
    *,
    mask_token_id: int | None = None,
    repeated: Repetition | None = None,
) -> Iterator[InputIdsNoise]:
    """Inside, `model` reads λ from the masks in its input; afterwards from its former source.

    `InputIdsNoise` describes the arguments and errors. To make this permanent, call
    set_noise_source(model, InputIdsNoise(…)).
    """
    former_sources = [(holder, holder.finder.given_source) for holder in core_holders(model)]
    mask = Backbone(model).mask_token_id(mask_token_id)
    source = InputIdsNoise(prompt_lengths, mask_token_id=mask, repeated=repeated)
    set_noise_source(model, source)
    try:
        yield source
    finally:
        for holder, former in former_sources:
            holder.finder.given_source = former
