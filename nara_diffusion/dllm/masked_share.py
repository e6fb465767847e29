"""λ of a masked language model: the masked share of each sample's answer.

    λ_i = masked tokens of answer i / tokens of answer i

This package's losses and samplers set it at each forward (`conditioned`). In other people's samplers it is read from
`input_ids`: what a forward's arguments can't say is given once, where the prompts end.

    with read_noise_from_input_ids(model, prompt_lengths=[12, 30]):
        somebody_elses_generate(model, …)

The prompt doesn't count, masked by guidance or not, and neither does padding, where an `attention_mask` says what that
is: (b, l), or a mask of four dimensions (b, heads, l, l), in which padding doesn't see itself. Other masks are refused.
`noise_level(model, …)` still beats it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from nara_diffusion.noise.denoisers import set_noise_source
from nara_diffusion.noise.level import MASKED_SHARE, core_holders, find_holders
from nara_diffusion.noise.level import noise_level as noise_level_of

from .models.backbone import Backbone

REPETITIONS = ("tiled", "interleaved")


def conditioned(model: nn.Module, noise_level: torch.Tensor) -> AbstractContextManager:
    """The context `noise_level(model, λ)` for a noise-aware model; a context that does nothing for any other.

    Adapters that were made without a `noise_convention` have the masked share's from now on.

    Args:
        model: the outermost module.
        noise_level: (b,) float32, λ.

    Raises:
        ValueError: an adapter that needs λ was trained with another definition of it.
    """
    holders = find_holders(model)
    if not any(holder.needs_noise or holder.merging.binds_level for holder in holders):
        return nullcontext()
    for holder in holders:
        names = holder.noisy(holder.active_names())
        for name, other in holder.finder.adopt_convention(names, MASKED_SHARE).items():
            raise ValueError(
                f"Adapter '{name}' was trained with λ defined as {other!r}, and this is {MASKED_SHARE!r}, the masked "
                "share of the answer: use an adapter that was trained with that, or call the model yourself inside "
                "`with noise_level(model, value):`."
            )
    return noise_level_of(model, noise_level)


class InputIdsNoise:
    """A noise source (`nara_diffusion.set_noise_source`): λ from the masks in `input_ids`.

    Args:
        prompt_lengths: columns before each answer, padding on the left included: one number for all rows, or (b,).
        mask_token_id: the token that counts.
        repeated: how a sampler repeats the b rows where it passes m · b of them: "tiled", all rows and then all
            again, as guidance does by torch.cat; "interleaved", each row m times in a row. Needed only if lengths
            differ.

    """

    convention = MASKED_SHARE

    def __init__(
        self,
        prompt_lengths: int | Sequence[int] | torch.Tensor,
        *,
        mask_token_id: int,
        repeated: str | None = None,
    ) -> None:
        if repeated not in (None, *REPETITIONS):
            raise ValueError(
                f"repeated is {repeated!r}, expected one of {', '.join(map(repr, REPETITIONS))}, or None"
            )
        self.prompt_lengths = torch.as_tensor(prompt_lengths).reshape(-1)
        self.mask_token_id = mask_token_id
        self.repeated = repeated

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """λ (B,) for a forward of `module`; a ValueError where its arguments don't say it."""
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        if (
            not isinstance(input_ids, torch.Tensor)
            or input_ids.ndim != 2
            or input_ids.is_floating_point()
        ):
            raise ValueError(
                "λ can't be read: this forward has no input_ids (batch, length): use noise_level(…)"
            )
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError(
                "λ can't be read from input_ids that continue a cache, a part of the sequence: use noise_level(model, "
                "masked share of the whole answer)"
            )
        rows, width = input_ids.shape
        starts = self._starts(rows).to(input_ids.device)[:, None]
        answer = torch.arange(width, device=input_ids.device) >= starts  # (B, l)
        attention_mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if attention_mask is not None:
            answer = answer & _tokens_that_count(attention_mask, rows, width)
        if not answer.any(1).all():
            row = int((~answer.any(1)).nonzero()[0])
            raise ValueError(
                f"λ can't be read: row {row} of input_ids has {width} tokens, and none of an answer"
            )
        masked = answer & (input_ids == self.mask_token_id)
        return masked.sum(1).float() / answer.sum(1)

    def _starts(self, rows: int) -> torch.Tensor:
        lengths = self.prompt_lengths
        times, rest = divmod(rows, len(lengths))
        if rest == 0 and (
            times == 1 or bool((lengths == lengths[0]).all()) or self.repeated is not None
        ):
            return (
                lengths.repeat(times)
                if self.repeated == "tiled"
                else lengths.repeat_interleave(times)
            )
        raise ValueError(
            f"λ can't be read: prompt_lengths has {len(lengths)} values and this forward {rows} rows. Say how the "
            "sampler repeats rows, repeated='tiled' (all, then all again, as in classifier-free guidance) or "
            "'interleaved' (each several times), or give one value a row"
        )


@contextmanager
def read_noise_from_input_ids(
    model: nn.Module,
    prompt_lengths: int | Sequence[int] | torch.Tensor,
    *,
    mask_token_id: int | None = None,
    repeated: str | None = None,
) -> Iterator[InputIdsNoise]:
    """Inside, `model` reads λ from the masks in its input; afterwards from its former source, if it had one.

    Arguments, and what is refused, as of `InputIdsNoise`. For good: set_noise_source(model, InputIdsNoise(…)).
    """
    before = [(holder, holder.finder.given_source) for holder in core_holders(model)]
    mask = Backbone(model).mask_token_id(mask_token_id)
    source = InputIdsNoise(prompt_lengths, mask_token_id=mask, repeated=repeated)
    set_noise_source(model, source)
    try:
        yield source
    finally:
        for holder, former in before:
            holder.finder.given_source = former


_HIDDEN = -1e4  # a bias of attention from which on a token isn't seen; libraries add this, a dtype's smallest or −∞


def _tokens_that_count(attention_mask: Any, rows: int, width: int) -> torch.Tensor:
    """Which tokens are no padding, (b, l) bool: those that see themselves, in a mask of four dimensions."""
    received = type(attention_mask).__name__
    if isinstance(attention_mask, torch.Tensor):
        received = f"of shape {tuple(attention_mask.shape)} and {attention_mask.dtype}"
        if attention_mask.shape == (rows, width):
            return attention_mask.bool()
        if attention_mask.ndim == 4 and all(n in (1, width) for n in attention_mask.shape[2:]):
            own = attention_mask.expand(-1, -1, width, width).diagonal(
                dim1=2, dim2=3
            )  # (b or 1, h, l)
            counts = own == 0 if own.is_floating_point() else own.bool()
            is_clear = not own.is_floating_point() or bool((counts | (own <= _HIDDEN)).all())
            if is_clear and len(own) in (1, rows) and bool((counts == counts[:, :1]).all()):
                return counts[:, 0].expand(rows, -1)
            received += ", with values in between or rows or heads that differ,"
    raise ValueError(
        f"λ can't be read: an attention_mask {received} doesn't tell which of the tokens are padding: pass one of "
        f"shape ({rows}, {width}), or use noise_level(…)"
    )
