"""The definition of λ that each adapter was trained with, compared with that of the source of λ."""

from __future__ import annotations

from copy import copy

from torch import nn

from nara_diffusion.noise.denoisers.lookup import why_static, why_undeclared
from nara_diffusion.noise.signals import NoiseSource
from nara_diffusion.tuner.config import NaraConfig

from .build_core import needs_noise


class NoiseConventions:
    """The definitions of λ of the adapters of one model, and the source that tells it.

    An adapter whose configuration names no definition takes that of the model's default source. Until a user sets a
    source, it is undecided: that source decides for it.

    Attributes:
        source: tells λ to forwards outside of `noise_level(…)`; None if nothing does.
        source_is_default: whether it follows from the model's class, and no user has set it.
        by_adapter: adapter → the name of its definition, None if unknown.
    """

    def __init__(self, source: NoiseSource | None) -> None:
        self.source = source
        self.source_is_default = True
        self.by_adapter: dict[str, str | None] = {}
        self._undecided: dict[str, NaraConfig] = {}

    def add(self, adapter_name: str, config: NaraConfig, is_stated: bool) -> None:
        """Add an adapter. `is_stated`: whether its own configuration named the definition."""
        self.by_adapter[adapter_name] = config.noise_convention
        self._undecided.pop(adapter_name, None)
        if self.source_is_default and not is_stated:
            self._undecided[adapter_name] = config

    def forget(self, adapter_name: str) -> None:
        self.by_adapter.pop(adapter_name, None)
        self._undecided.pop(adapter_name, None)

    def is_undecided(self, adapter_name: str) -> bool:
        return adapter_name in self._undecided

    def check_source(self, source: NoiseSource | None) -> None:
        """Raises ValueError if `source` and an adapter define λ differently."""
        for adapter_name, convention in self.by_adapter.items():
            if not self.is_undecided(adapter_name):
                check_convention(source, adapter_name, convention)

    def set_source(self, source: NoiseSource | None) -> None:
        """See `nara_diffusion.set_noise_source`. Undecided adapters take the definition of `source`."""
        self.check_source(source)
        self.source = source
        if source is None:
            return
        self.source_is_default = False
        for adapter_name in list(self._undecided):
            self._decide(adapter_name, getattr(source, "convention", None))

    def adopt(self, convention: str, adapter_names: list[str]) -> dict[str, str]:
        """Give those of `adapter_names` that are undecided this definition, unless one of them has another.

        Returns:
            Adapter → its other definition; empty if they now agree.
        """
        decided = {name: self.by_adapter.get(name) for name in adapter_names if not self.is_undecided(name)}
        others = {name: other for name, other in decided.items() if other not in (None, convention)}
        if not others:
            for adapter_name in self._undecided.keys() & adapter_names:
                self._decide(adapter_name, convention)
        return others  # type: ignore[return-value]

    def _decide(self, adapter_name: str, convention: str | None) -> None:
        config = self._undecided.pop(adapter_name)
        config.noise_convention = self.by_adapter[adapter_name] = convention


def check_convention(source: NoiseSource | None, adapter_name: str, convention: str | None) -> None:
    told = getattr(source, "convention", None)
    if source is None or convention is None or told == convention:
        return
    raise ValueError(
        f"Adapter '{adapter_name}' was trained with λ defined as {convention!r}, but the source of λ tells "
        f"{told!r}: use a source of the same convention. For a custom definition of λ, call "
        "register_noise_source(source) before the model's first adapter is added."
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


def check_not_static(model: nn.Module, config: NaraConfig, adapter_name: str) -> None:
    """Raises ValueError if `config` needs λ, names no definition of it, and `model` is of a class that has none."""
    why = why_static(model)
    if why and config.noise_convention is None and needs_noise(config):
        raise ValueError(
            f"Adapter '{adapter_name}' has core_type={config.core_type!r}, whose update depends on λ.{why} If you run "
            'it on noisy inputs yourself, name what λ is there, NaraConfig(noise_convention="…"), and tell it by '
            "noise_level(model, value)."
        )


def denoiser_hint(root: nn.Module) -> str:
    kinds = [kind.__name__ for kind in type(root).__mro__]
    if "ModelMixin" not in kinds:  # of Diffusers
        return ""
    declare = f" To have it read its timestep, declare register_denoiser('{kinds[0]}', meaning) before adding adapters."
    return declare + why_undeclared(root)
