"""Read λ of a masked language model from its input: the masked share of each sample's answer.

λ_i = masked tokens of answer i / tokens of answer i
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .level import host_values
from .rows import REPETITIONS, Repetition, repeat_rows
from .sources import MASKED_SHARE


class InputIdsNoise:
    """Compute λ from the masks in `input_ids`; pass it to `nara_diffusion.set_noise_source`.

    The prompt does not count, whether or not guidance has masked it. Padding does not count if an
    `attention_mask` (b, l) marks it. If the tensors are not on the CPU, λ is NaN instead of an
    error if no answer tokens remain.

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
            shape = getattr(attention_mask, "shape", type(attention_mask).__name__)
            if shape != input_ids.shape:
                raise ValueError(
                    f"λ can't be read: attention_mask is {shape}, which doesn't show which tokens are "
                    f"padding: pass one of shape ({rows}, {width}), or use noise_level(…)"
                )
            answer = answer & attention_mask.bool()
        lengths = answer.sum(1)  # (rows,)
        values = host_values(lengths)
        if values is not None and 0 in values:
            raise ValueError(
                f"λ can't be read: none of the {width} tokens in row {values.index(0)} of input_ids belongs to an "
                "answer. Check prompt_lengths and attention_mask."
            )
        masked = answer & (input_ids == self.mask_token_id)
        return masked.sum(1).float() / lengths  # 0 / 0 is NaN

    def _starts(self, rows: int) -> Tensor:
        """Return the first column of each row's answer, (rows,)."""
        lengths = self.prompt_lengths
        times, remainder = divmod(rows, len(lengths))
        is_known = times == 1 or self.repeated is not None or len(set(lengths.tolist())) == 1
        if remainder == 0 and is_known:
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
