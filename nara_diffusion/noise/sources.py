"""Sources of λ: setting one on a model, registering one for a custom definition of λ, and what adapters need of it.

An adapter is saved with the name of the definition that it was trained with (`noise_convention`), and is refused by a
model whose source has another. Registering a source under that name says how to read λ for such an adapter.
"""

from __future__ import annotations

from torch import nn

from .denoisers import Denoiser
from .level import MASKED_SHARE, NoiseSource, core_holders, find_holders
from .timesteps import CONVENTIONS

_KNOWN = (*CONVENTIONS, MASKED_SHARE)
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
