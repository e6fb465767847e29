"""The definition of λ that each adapter was trained with, compared with that of the source of λ."""

from __future__ import annotations

from copy import copy

from torch import nn

from nara_diffusion.config import NaraConfig
from nara_diffusion.cores.registry import needs_noise
from nara_diffusion.noise.denoisers.denoiser import Denoiser
from nara_diffusion.noise.denoisers.lookup import why_static, why_undeclared
from nara_diffusion.noise.signals import NoiseSource
from nara_diffusion.noise.sources import first_source
from nara_diffusion.noise.timesteps import UndeclaredTimestep


class NoiseConventions:
    """The definitions of λ of the adapters of one model, and the source that tells it.

    An adapter whose configuration names no definition takes that of the model's default source. Until a user sets a
    source, it is undecided: that source decides for it. The default source is that of the first adapter with a
    definition, or, without one (a plain LoRA whose strength depends on λ), of the model's class.

    Args:
        denoiser: what is known of the model's class, if it is a denoiser of Diffusers.
        convention: the definition of the first adapter, if it names one.

    Attributes:
        source: tells λ to forwards outside of `noise_level(…)`; None if nothing does.
        source_is_default: whether it follows from the model's class and adapters, and no user has set or removed it.
        by_adapter: adapter → the name of its definition, None if unknown.
    """

    def __init__(self, denoiser: Denoiser | None = None, convention: str | None = None) -> None:
        self._denoiser = denoiser
        self.source = first_source(denoiser, convention)
        self.source_is_default = True
        self.by_adapter: dict[str, str | None] = {}
        self._undecided: dict[str, NaraConfig] = {}

    def add(self, adapter_name: str, config: NaraConfig, is_stated: bool) -> None:
        """Add an adapter, after `completed`. `is_stated`: whether its own configuration named the definition."""
        self.source = self._source_with(adapter_name, config.noise_convention)
        self.by_adapter[adapter_name] = config.noise_convention
        self._undecided.pop(adapter_name, None)
        if not is_stated and (self.source_is_default or self.source is None):
            self._undecided[adapter_name] = config

    def forget(self, adapter_name: str) -> None:
        self.by_adapter.pop(adapter_name, None)
        self._undecided.pop(adapter_name, None)
        if self.source_is_default and not self._defining():
            self.source = self._default_source(None)

    def is_undecided(self, adapter_name: str) -> bool:
        return adapter_name in self._undecided

    def completed(self, adapter_name: str, config: NaraConfig) -> NaraConfig:
        """`config` of an adapter to be added, or to take the place of that of this name, with its definition of λ.

        That is the one of the model's source, if it names none itself and needs λ.

        Raises:
            ValueError: it names another.
        """
        source = self._source_with(adapter_name, config.noise_convention)
        remedy = self._remedy(adapter_name, config.noise_convention)
        _check(source, adapter_name, config.noise_convention, remedy)
        if config.noise_convention is not None or source is None or not needs_noise(config):
            return config
        config = copy(config)  # the caller's may serve several models
        config.noise_convention = getattr(source, "convention", None)
        return config

    def check_source(self, source: NoiseSource | None) -> None:
        """Raises ValueError if `source` and an adapter define λ differently."""
        for adapter_name, convention in self.by_adapter.items():
            if not self.is_undecided(adapter_name):
                _check(source, adapter_name, convention, "so pass one that tells it so, or remove the adapter first.")

    def set_source(self, source: NoiseSource | None) -> None:
        """See `nara_diffusion.set_noise_source`. Undecided adapters take the definition of `source`."""
        self.check_source(source)
        self.source_is_default = self.source_is_default and source is self.source
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

    def _defining(self, but: str | None = None) -> list[str]:
        """The adapters, but for one, that have a definition."""
        return [name for name, convention in self.by_adapter.items() if name != but and convention is not None]

    def _source_with(self, adapter_name: str, convention: str | None) -> NoiseSource | None:
        """The source once an adapter of this name and definition is there: another one, while no other has any."""
        told = getattr(self.source, "convention", None)
        if not self.source_is_default or convention in (None, told) or self._defining(but=adapter_name):
            return self.source
        return self._default_source(convention)

    def _default_source(self, convention: str | None) -> NoiseSource | None:
        source = first_source(self._denoiser, convention)
        if isinstance(source, UndeclaredTimestep) and isinstance(self.source, UndeclaredTimestep):
            return source.of_length(self.source.num_train_timesteps if self.source.is_counted else None)
        return source

    def _remedy(self, adapter_name: str, convention: str | None) -> str:
        """What to do where the source tells λ otherwise than an adapter to be added needs."""
        others = self._defining(but=adapter_name)
        if others:
            names = " and ".join(map(repr, others))
            return (
                f"as {names} of this model needs, and one model reads λ by one definition. Remove {names} first, "
                f"pipe.delete_adapters({others!r}) or delete_adapter(name) of a PeftModel, or add '{adapter_name}' to "
                "another pipeline or model."
            )
        if not self.source_is_default:
            return f"which set_noise_source has set. Set one of {convention!r} before, set_noise_source(model, source)."
        return (
            "which is what its class means by its timestep. Add the adapter to the model that it was trained on; for a "
            "custom definition of λ, call register_noise_source(source) before the model's first adapter is added."
        )


def _check(source: NoiseSource | None, adapter_name: str, convention: str | None, remedy: str) -> None:
    told = getattr(source, "convention", None)
    if source is not None and convention is not None and told != convention:
        raise ValueError(
            f"Adapter '{adapter_name}' was trained with λ defined as {convention!r}, but the source of λ tells "
            f"{told!r}, {remedy}"
        )


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
