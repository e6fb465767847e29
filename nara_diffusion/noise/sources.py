"""Sources of λ: setting one on a model, registering one for a custom definition of λ, and what adapters need of it.

An adapter is saved with the name of the definition that it was trained with (`noise_convention`), and is refused by a
model whose source has another. Registering a source under that name says how to read λ for such an adapter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .denoisers import Denoiser
from .level import MASKED_SHARE, NoiseSignals, NoiseSource, arguments_of, core_holders, find_holders
from .timesteps import CONVENTIONS

BLOCK_MASKED_SHARE = "block_masked_share"
_KNOWN = (*CONVENTIONS, MASKED_SHARE, BLOCK_MASKED_SHARE)
_sources: dict[str, NoiseSource] = {}


def register_noise_source(source: NoiseSource) -> None:
    """Use `source` for every model whose first adapter has the `noise_convention` of the source.

        register_noise_source(ShareOfFrames())  # whose `convention` is "share_of_frames"
        pipe.load_nara_weights("adapter")       # trained with NaraConfig(noise_convention="share_of_frames")

    It is a callable (module, args, kwargs) → NoiseSignals, λ (1,) or (b,) in [0, 1]. It holds for models that are
    adapted afterwards, and takes precedence over the default of their class. All of them share the one source.

    Raises:
        ValueError: the source names no convention, one that this package defines, or one that another source tells.
    """
    name = getattr(source, "convention", None)
    if not (isinstance(name, str) and name and callable(source)):
        raise ValueError(
            f"{source!r} is no source of λ: expected a callable (module, args, kwargs) → NoiseSignals whose attribute "
            "`convention` names λ's definition."
        )
    if name in _KNOWN:
        raise ValueError(
            f"λ as {name!r} is defined by this package: name your definition otherwise, or give one model a source of "
            "its own, set_noise_source(model, source)."
        )
    if _sources.setdefault(name, source) is not source:
        raise ValueError(f"λ as {name!r} has a source already, {_sources[name]!r}: name your definition otherwise.")


def first_source(denoiser: Denoiser | None, convention: str | None) -> NoiseSource | None:
    """The default source of λ of a model, until a user sets one; None if there is none.

    Args:
        denoiser: what is known of the model's class, if it is a denoiser of Diffusers.
        convention: how its first adapter defines λ, if it says so.
    """
    if convention in _sources:
        return _sources[convention]
    return None if denoiser is None else denoiser.read_as(convention)


def set_noise_source(model: nn.Module, source: NoiseSource | None) -> None:
    """Read λ (1,) or (b,) from `source` at each forward of `model` outside of `noise_level(…)`; None removes it.

    Raises:
        ValueError: `model` holds no NaRA adapter, or one was trained with another convention of λ.
    """
    holders = core_holders(model)
    for holder in holders:
        holder.check_source(source)
    for holder in holders:
        holder.set_source(source)


class BlockMasks:
    """A source of λ for language models that denoise a text block by block, as Diffusers' LLaDA2Pipeline does.

    λ = masks of the active block / masks with which it began, of each sample: "block_masked_share". The active block is
    the last `block_length` tokens of `input_ids`; tokens that a scheduler edits later are no masks, and count as text.

    Args:
        mask_token_id: the token that counts. block_length: tokens of a block.
    """

    convention = BLOCK_MASKED_SHARE

    def __init__(self, mask_token_id: int, block_length: int) -> None:
        self.mask_token_id = mask_token_id
        self.block_length = block_length
        self._before: Tensor | None = None  # the tokens (b, l) of the last forward
        self._first = torch.zeros(0)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoiseSignals:
        """λ (b,). Raises ValueError: the forward has no `input_ids` (b, l) of at least a block."""
        tokens = arguments_of(module, args, kwargs).get("input_ids")
        if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.shape[1] < self.block_length:
            raise ValueError(
                f"λ can't be counted: this forward of {type(module).__name__} has no input_ids (batch, length) of "
                f"{self.block_length} tokens or more."
            )
        masks, before = self._count(tokens), self._before
        if (
            before is None
            or before.shape != tokens.shape
            or not torch.equal(before[:, : -self.block_length], tokens[:, : -self.block_length])
            or bool((masks > self._count(before)).any())
        ):  # a block begins, behind what is written, or in another call of the pipeline
            self._first = masks
        self._before = tokens.clone()
        return NoiseSignals(masks.float() / self._first.clamp(min=1))

    def _count(self, tokens: Tensor) -> Tensor:
        return (tokens[:, -self.block_length :] == self.mask_token_id).sum(1)


# ---------------------------------------------------------------------- what the active adapters of a model need


def is_noise_aware(model: nn.Module) -> bool:
    """Whether an enabled, active adapter of `model` needs λ."""
    return any(holder.needs_noise for holder in find_holders(model))


def mask_density_radius(model: nn.Module) -> int | None:
    """The radius R, in tokens, of the mask density that the active adapters of `model` read; None if they don't.

    Raises:
        ValueError: active adapters read densities of different radii.
    """
    radii = {radius for holder in find_holders(model) for radius in holder.density_radii}
    if len(radii) > 1:
        raise ValueError(
            f"Active adapters read mask densities of different radii, {sorted(radii)}: activate one at a time."
        )
    return radii.pop() if radii else None
