"""The sources of λ: what computes λ from a forward's arguments, and the names of its definitions.

A forward of an adapted model takes λ from the first of these that exists:

1. the context `with noise_level(model, value): …` (`context`);
2. the source that was set with `set_noise_source(model, source)`;
3. the source that was registered with `register_noise_source` for the `noise_convention` of the
   model's first adapter;
4. the default source of the model's class: `timesteps.DenoiserNoise` for classes that receive a timestep
   from Diffusers' pipelines (see the table in `denoisers`), `blocks.BlockNoise` for LLaDA2, and
   `canvas_source.CanvasNoise` for DiffusionGemma.

An adapter is saved with the name of its definition of λ (`noise_convention`). If the model's source
uses another definition, an error is raised. Only forwards of the whole model call a source.

`InputIdsNoise` reads λ of a masked language model from its input, and is never a default:

    λ_i = masked tokens of answer i / tokens of answer i
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .context import core_holders
from .level import host_values
from .rows import REPETITIONS, Repetition, repeat_rows

MASKED_SHARE = "masked_share"
"""The name of λ's definition for masked language models."""

BLOCK_SHARE = "masked_share_of_block"
"""The same, of each block of the answer: clean text has λ = 0 (LLaDA2)."""

CORRUPTED_SHARE = "corrupted_share"
"""The name of λ's definition for DiffusionGemma: the share of a canvas that holds random tokens."""

CONVENTIONS = ("timestep", "flow", "edm", MASKED_SHARE, BLOCK_SHARE, CORRUPTED_SHARE)
"""The names of this package's definitions of λ; `timesteps` has the first three."""


class NoiseSource(Protocol):
    """Compute λ (1,) or (b,) from a forward's arguments; `convention` names the definition of λ."""

    convention: str

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor: ...


registered: dict[str, NoiseSource] = {}
"""Convention → the source that `register_noise_source` has made its default."""


def register_noise_source(source: NoiseSource) -> None:
    """Make `source` the default source of models that have its convention.

        register_noise_source(ShareOfFrames())  # its `convention` is "share_of_frames"
        pipe.load_nara_weights("adapter")  # NaraConfig(noise_convention="share_of_frames")

    A model takes the `noise_convention` of its first adapter. A source is a callable
    (module, args, kwargs) → λ (1,) or (b,) in [0, 1]. The source applies to models that are adapted
    after this call, and takes precedence over the default source of their class. All these models
    share this one object.

    Raises:
        ValueError: the source has no convention, or its convention is already used by this package
            or by another source.
    """
    name = getattr(source, "convention", None)
    if not (isinstance(name, str) and name and callable(source)):
        raise ValueError(
            f"{source!r} is not a source of λ: expected a callable (module, args, kwargs) → λ (1,) or "
            "(b,) with an attribute `convention`, the name of its definition."
        )
    if name in CONVENTIONS or registered.setdefault(name, source) is not source:
        raise ValueError(
            f"λ as {name!r} is already defined, by {registered.get(name, 'this package')}: choose another "
            "name for your definition, or give one model its own source, "
            "set_noise_source(model, source)."
        )


def set_noise_source(model: nn.Module, source: NoiseSource | None) -> None:
    """Read λ (1,) or (b,) from `source` at each forward of `model` outside `noise_level(…)`.

    Pass None to remove the source.

    Raises:
        ValueError: `model` has no NaRA adapter, or an adapter was trained with another definition
            of λ.
    """
    holders = core_holders(model)
    for holder in holders:
        holder.finder.check_source(source)
    for holder in holders:
        holder.finder.set_source(source)


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
