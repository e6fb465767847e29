"""What each denoiser of Diffusers means by its timestep: looked up for a model, declared by a user.

A class is looked up by its name, then by those of its base classes.
"""

from __future__ import annotations

from torch import nn

from ..denoiser_classes import DENOISERS, SETTLED_BY_CONFIG
from ..timesteps import TimestepNoise
from .denoiser import Denoiser
from .undeclared_classes import STATIC, UNDECLARED

_DENOISERS = dict(DENOISERS)
"""Class name → what is known of it; `register_denoiser` adds to it."""


def register_denoiser(
    class_name: str, meaning: str = "discrete", *, argument: str = "timestep", sample_major: bool = False
) -> None:
    """Declare what the timestep of a class of denoisers means, before adapters are added to one.

        register_denoiser("MyTransformer2DModel", "sigma")

    Args: see `TimestepNoise` and `Denoiser`.

    Raises:
        ValueError: an unknown meaning, or the class is declared otherwise already.
    """
    TimestepNoise(meaning)
    denoiser = Denoiser(meaning, argument, sample_major)
    if _DENOISERS.setdefault(class_name, denoiser) != denoiser:
        raise ValueError(
            f"{class_name} is declared already, as {_DENOISERS[class_name]}: give a model that means something else a "
            "source of its own, set_noise_source(model, TimestepNoise(meaning))."
        )


def denoiser_of(model: nn.Module) -> Denoiser | None:
    """The entry of the class of `model`; None if no such denoiser was declared."""
    name = next((kind.__name__ for kind in type(model).__mro__ if kind.__name__ in _DENOISERS), None)
    if name is None:
        return None
    settle = SETTLED_BY_CONFIG.get(name)
    return _DENOISERS[name] if settle is None else settle(_DENOISERS[name], model.config)


def why_undeclared(model: nn.Module) -> str:
    """Why the class of `model`, one of Diffusers, is not declared, for an error; empty where nothing is known of it."""
    name = next((kind.__name__ for kind in type(model).__mro__ if kind.__name__ in (*STATIC, *UNDECLARED)), None)
    if name is None:
        return ""
    return why_static(model) or f" {name} is not declared by itself: {UNDECLARED[name]}."


def why_static(model: nn.Module) -> str:
    """Why a forward of `model` has no λ, for an error; empty where it has one, or where nothing is known of it."""
    name = next((kind.__name__ for kind in type(model).__mro__ if kind.__name__ in STATIC), None)
    if name is None or denoiser_of(model) is not None:
        return ""
    return (
        f" {name} is {STATIC[name]}, which pipelines run outside of the denoising loop, where there is no λ: there "
        'adapt it by NaraConfig(core_type="identity", …).'
    )
