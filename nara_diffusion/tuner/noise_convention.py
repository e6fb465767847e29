"""The definition of λ that an adapter was trained with, checked against that of a source."""

from __future__ import annotations

from copy import copy

from torch import nn

from nara_diffusion.noise.denoisers import why_undeclared
from nara_diffusion.noise.signals import NoiseSource

from .build_core import needs_noise
from .config import NaraConfig


def check_convention(source: NoiseSource | None, adapter_name: str, convention: str | None) -> None:
    told = getattr(source, "convention", None)
    if source is None or convention is None or told == convention:
        return
    raise ValueError(
        f"Adapter '{adapter_name}' was trained with λ defined as {convention!r}, but the source of λ tells "
        f"{told!r}: use a source of the same convention. If that is a definition of your own, say how λ is told by it "
        "before the model's first adapter is added: register_noise_source(source)."
    )


def with_convention(config: NaraConfig, source: NoiseSource | None, adapter_name: str) -> NaraConfig:
    """`config` with the convention of the model's source of λ, if it names none itself and needs λ.

    Raises:
        ValueError: it names another.
    """
    check_convention(source, adapter_name, config.noise_convention)
    if config.noise_convention is not None or source is None or not needs_noise(config):
        return config
    config = copy(config)  # the caller's may serve several models
    config.noise_convention = getattr(source, "convention", None)
    return config


def denoiser_hint(root: nn.Module) -> str:
    kinds = [kind.__name__ for kind in type(root).__mro__]
    if "ModelMixin" not in kinds:  # of Diffusers
        return ""
    declare = f" To have it read its timestep, declare register_denoiser('{kinds[0]}', meaning) before adding adapters."
    return declare + why_undeclared(root)
