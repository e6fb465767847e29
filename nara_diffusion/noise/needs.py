"""Which signals of the noise the active adapters of a model need."""

from __future__ import annotations

from torch import nn

from .level import find_holders


def is_noise_aware(model: nn.Module) -> bool:
    """Whether an enabled, active adapter of `model` needs λ."""
    return any(holder.needs_noise for holder in find_holders(model))


def needs_mask_density(model: nn.Module) -> bool:
    """Whether an enabled, active adapter of `model` reads the mask density."""
    return mask_density_radius(model) is not None


def mask_density_radius(model: nn.Module) -> int | None:
    """The radius R, in tokens, of the mask density that the active adapters of `model` read, or None.

    Raises:
        ValueError: active adapters read densities of different radii.
    """
    radii = {radius for holder in find_holders(model) for radius in holder.density_radii}
    if len(radii) > 1:
        raise ValueError(
            f"Active adapters read mask densities of different radii, {sorted(radii)}: activate one at a time."
        )
    return radii.pop() if radii else None
