"""Read λ of a masked language model from its input: the masked share of each sample's answer.

λ_i = masked tokens of answer i / tokens of answer i
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .level import MASKED_SHARE, host_values
from .rows import REPETITIONS, Repetition, repeat_rows


class InputIdsNoise:
    """Compute λ from the masks in `input_ids`; pass it to `nara_diffusion.set_noise_source`.

    The prompt does not count, whether or not guidance has masked it. Padding does not count if an
    `attention_mask` marks it. That mask may be (b, l), or (b, heads, l, l) if padding does not see
    itself. If the tensors are not on the CPU, no error can be raised. Instead, λ is NaN if no
    answer tokens remain, or if a mask (b, heads, l, l) is ambiguous.

    Args:
        prompt_lengths: the number of columns before each answer, including padding on the left,
            as one number for all rows, or as (b,).
        mask_token_id: the id of the mask token.
        repeated: how a sampler repeats the b rows if it passes k · b of them. "tiled" means that
            the whole batch is repeated, as guidance does with torch.cat. "interleaved" means that
            each row is repeated k times in succession. Needed only if the lengths differ.
    """

    convention = MASKED_SHARE

    def __init__(
        self,
        prompt_lengths: int | Sequence[int] | Tensor,
        *,
        mask_token_id: int,
        repeated: Repetition | None = None,
    ) -> None:
        if repeated not in (None, *REPETITIONS):
            choices = ", ".join(map(repr, REPETITIONS))
            raise ValueError(f"repeated is {repeated!r}, expected one of {choices}, or None")
        self.prompt_lengths = torch.as_tensor(prompt_lengths).reshape(-1).cpu()
        self.mask_token_id = mask_token_id
        self.repeated: Repetition | None = repeated

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return λ (rows,) for a forward of `module`.

        Raises:
            ValueError: the arguments do not determine λ.
        """
        input_ids = _input_ids(args, kwargs)
        rows, width = input_ids.shape
        starts = self._starts(rows).to(input_ids.device, non_blocking=True)[:, None]
        answer = torch.arange(width, device=input_ids.device) >= starts  # (rows, l)
        attention_mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if attention_mask is not None:
            answer = answer & _tokens_that_count(attention_mask, rows, width)
        lengths = answer.sum(1)  # (rows,)
        values = host_values(lengths)
        if values is not None and 0 in values:
            raise ValueError(
                f"λ can't be read: row {values.index(0)} of input_ids has {width} tokens, and none is in an answer"
            )
        masked = answer & (input_ids == self.mask_token_id)
        return masked.sum(1).float() / lengths  # 0 / 0 is NaN

    def _starts(self, rows: int) -> Tensor:
        """Return the first column of each row's answer, (rows,)."""
        lengths = self.prompt_lengths
        times, rest = divmod(rows, len(lengths))
        is_known = times == 1 or self.repeated is not None or len(set(lengths.tolist())) == 1
        if rest == 0 and is_known:
            return repeat_rows(lengths, times, self.repeated or "interleaved")
        raise ValueError(
            f"λ can't be read: prompt_lengths has {len(lengths)} values and this forward {rows} "
            "rows. Pass how the sampler repeats rows, repeated='tiled' (all, then all again, as in "
            "classifier-free guidance) or 'interleaved' (each several times), or one value per row"
        )


def _input_ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the complete sequences (rows, l) that a forward gets."""
    input_ids = kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
        raise ValueError(
            "λ can't be read: this forward has no input_ids (batch, length): use noise_level(…)"
        )
    cache = kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError(
            "λ can't be read from input_ids that continue a cache, a part of the sequence: use "
            "noise_level(model, masked share of the whole answer)"
        )
    return input_ids


_HIDDEN = -1e4
"""A token with this attention bias or less is hidden. Libraries add −1e4, −∞ or a minimum."""


def _tokens_that_count(attention_mask: object, rows: int, width: int) -> Tensor:
    """Return which tokens are not padding, (rows, l) bool."""
    received = type(attention_mask).__name__
    if isinstance(attention_mask, Tensor):
        if attention_mask.shape == (rows, width):
            return attention_mask.bool()
        counts = _seen_by_themselves(attention_mask, rows, width)
        if counts is not None:
            return counts
        received = f"of shape {tuple(attention_mask.shape)} and {attention_mask.dtype}"
    raise ValueError(
        f"λ can't be read: an attention_mask {received} doesn't show which tokens are padding: pass "
        f"one of shape ({rows}, {width}), or use noise_level(…)"
    )


def _seen_by_themselves(attention_mask: Tensor, rows: int, width: int) -> Tensor | None:
    """Return which tokens see themselves, (rows, l) bool, or None if rows or heads are ambiguous.

    If the heads are ambiguous and the mask is not on the CPU, no token counts.
    """
    if attention_mask.ndim != 4 or any(n not in (1, width) for n in attention_mask.shape[2:]):
        return None
    square = attention_mask.expand(-1, -1, width, width)
    own = square.diagonal(dim1=2, dim2=3)  # (rows or 1, heads, l)
    if len(own) not in (1, rows):
        return None
    counts = own == 0 if own.is_floating_point() else own.bool()
    is_clear = (counts == counts[:, :1]).all()
    if own.is_floating_point():  # no bias in between
        is_clear = is_clear & (counts | (own <= _HIDDEN)).all()
    if host_values(is_clear) == [False]:
        return None
    return (counts[:, 0] & is_clear).expand(rows, -1)
