"""Where a model's λ comes from, and whether that is λ as its adapters were trained with it.

An adapter's configuration names its definition of λ. One that names none takes that of the source; until a user sets a
source, it is *assumed*, and that source decides. The default source follows from the model's class and the first
definition. N, and what a small timestep means, come from the present scheduler of the pipelines that loaded the
adapters.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import replace
from typing import Any

from nara_diffusion.cores.registry import needs_noise
from nara_diffusion.noise.denoisers import Denoiser
from nara_diffusion.noise.level import NoiseSource
from nara_diffusion.noise.prediction import carried_scheduler, how_to_set, prediction_by, prediction_in
from nara_diffusion.noise.sources import first_source

REPLACED = "_nara_replaced_scheduler"
"""The attribute of a pipeline with the scheduler that it had before an adapter's was set."""


class _DEFAULT:
    """In the place of a source, as long as no user has set or removed one; a class, so that copies keep it."""


class HasSource:
    """The source of λ of a holder of cores.

    Attributes:
        pipelines: weak references to the pipelines that loaded adapters.
        length: N where there is no such pipeline: that of the last one, or of a training; None for 1000.
    """

    root: Any
    configs: dict[str, Any]
    reading: Callable[[], list[str]]
    depends_on_noise: Callable[[str], bool]

    def init_source(self, denoiser: Denoiser | None) -> None:
        self._denoiser = denoiser
        self._source: Any = _DEFAULT
        self.length: int | None = None
        self._made: tuple[Any, NoiseSource | None] | None = None
        self.pipelines: list[weakref.ref[Any]] = []

    # ------------------------------------------------------------------ the source

    @property
    def source_is_default(self) -> bool:
        """Whether no user has set or removed it."""
        return self._source is _DEFAULT

    @property
    def source(self) -> NoiseSource | None:
        """Tells λ to forwards outside of `noise_level(…)`; None if nothing does."""
        return self._source_with(next(iter(self._defined().values()), None))

    def present_source(self) -> NoiseSource | None:
        """`source` with the N, and the meaning of small timesteps, of the pipelines' present schedulers.

        Where the pipelines have gone, N stays the last one.
        """
        if not self.source_is_default:
            return self._source
        convention = next(iter(self._defined().values()), None)
        schedulers = self.schedulers()
        lengths = [scheduler.config.get("num_train_timesteps") for scheduler in schedulers]
        state = (convention, [*map(id, schedulers)], lengths, self.length)
        if self._made is not None and self._made[0] == state:  # as in the forward before
            return self._made[1]
        source = first_source(self._denoiser, convention)
        if isinstance(source, Denoiser):
            if schedulers:
                source = source.under(schedulers)
                self.length = source.num_train_timesteps
            elif self.length is not None:
                source = replace(source, num_train_timesteps=self.length)
        self._made = ((*state[:3], self.length), source)
        return source

    def set_source(self, source: NoiseSource | None) -> None:
        """See `nara_diffusion.set_noise_source`. Assumed definitions become that of `source`."""
        self.check_source(source)
        self._source = source
        for config in self.configs.values() if source is not None else ():
            if is_assumed(config):
                config.noise_convention = getattr(source, "convention", None)
                config.assumes_convention = False

    def restore_source(self, source: NoiseSource | None, is_default: bool) -> None:
        """Undo `set_source`: what `source` and `source_is_default` were before."""
        self._source = _DEFAULT if is_default else source

    def check_source(self, source: NoiseSource | None) -> None:
        """Raises ValueError if `source` and an adapter define λ differently."""
        for name, convention in self._defined().items():
            if not is_assumed(self.configs[name]):
                _check(source, name, convention, "so pass one that tells it so, or remove the adapter first.")

    def _source_with(self, convention: str | None) -> NoiseSource | None:
        return first_source(self._denoiser, convention) if self.source_is_default else self._source

    # ------------------------------------------------------------------ the adapters' definitions of λ

    def _defined(self, but: str | None = None) -> dict[str, str]:
        """Adapter → its definition of λ, of those that have one."""
        conventions = {name: getattr(config, "noise_convention", None) for name, config in self.configs.items()}
        return {name: each for name, each in conventions.items() if each is not None and name != but}

    def complete(self, name: str, config: Any) -> Any:
        """A copy of `config` of an adapter to be added, or to take the place of that of this name, with its definition.

        Raises:
            ValueError: it has another than the source.
        """
        others = self._defined(but=name)
        source = self._source_with(next(iter(others.values()), config.noise_convention))
        if not is_assumed(config):
            _check(source, name, config.noise_convention, self._remedy(name, config.noise_convention, list(others)))
        config = copy(config)  # the caller's may serve several models
        if source is not None and needs_noise(config) and (config.noise_convention is None or is_assumed(config)):
            config.noise_convention = getattr(source, "convention", None)
            config.assumes_convention = self.source_is_default
        elif config.noise_convention is None:
            config.assumes_convention = True
        return config

    def adopt_convention(self, convention: str) -> dict[str, str]:
        """Give the active, λ-dependent adapters whose definition is assumed this one, unless one of them has another.

        Returns:
            Adapter → its other definition; empty if they now agree.
        """
        defined, names = self._defined(), [name for name in self.reading() if self.depends_on_noise(name)]
        others = {name: defined[name] for name in names if name in defined and not is_assumed(self.configs[name])}
        others = {name: other for name, other in others.items() if other != convention}
        for name in [] if others else names:
            config = self.configs[name]
            if is_assumed(config):
                config.noise_convention, config.assumes_convention = convention, False
        return others

    def _remedy(self, name: str, convention: str | None, others: list[str]) -> str:
        """What to do where the source tells λ otherwise than an adapter to be added needs."""
        if others:
            return f"as {' and '.join(map(repr, others))} of this model needs: remove that first, or use another model."
        if not self.source_is_default:
            return f"which set_noise_source has set. Set one of {convention!r} before, set_noise_source(model, source)."
        return (
            "which is what its class means by its timestep. Add the adapter to the model that it was trained on; for a "
            "custom definition of λ, call register_noise_source(source) before the model's first adapter is added."
        )

    # ------------------------------------------------------------------ the pipelines' schedulers

    def add_pipeline(self, pipe: Any) -> None:
        """Remember a pipeline that loaded an adapter."""
        self.pipelines = [ref for ref in self.pipelines if ref() is not None and ref() is not pipe]
        self.pipelines.append(weakref.ref(pipe))

    def present_pipelines(self) -> list[Any]:
        return [pipe for ref in self.pipelines if (pipe := ref()) is not None]

    def schedulers(self) -> list[Any]:
        """The present schedulers of the pipelines that loaded adapters."""
        schedulers = (getattr(pipe, "scheduler", None) for pipe in self.present_pipelines())
        return [scheduler for scheduler in schedulers if hasattr(scheduler, "config")]

    def check_prediction(self, names: Iterable[str]) -> None:
        """Refuse a forward while a pipeline's scheduler expects another prediction.

        Args:
            names: of the adapters that are read, and of those that are merged.

        Raises:
            ValueError: it does; or two of the adapters were trained for different predictions.
        """
        if not self.pipelines:
            return
        configs, pipes = getattr(self.root, "peft_config", {}), self.present_pipelines()
        carries = any(getattr(config, "scheduler", None) for config in configs.values())
        if not carries and not any(REPLACED in vars(pipe) for pipe in pipes):
            return
        fields = carried_scheduler(configs, names)
        for pipe in pipes:
            own = vars(pipe).get(REPLACED)
            wanted = prediction_by(own) if fields is None else prediction_in(fields)
            scheduler = getattr(pipe, "scheduler", None)
            found = None if wanted is None else prediction_by(scheduler)
            if found is None or found == wanted:
                continue
            back = "" if own is None else " pipe.unload_nara_weights() brings the pipeline's own scheduler back."
            raise ValueError(
                f"With its active adapters the denoiser predicts {wanted}, but the scheduler of the pipeline that "
                f"loaded them, {type(scheduler).__name__}, takes it for {found}. Set the one that belongs to them: "
                f"{how_to_set(fields)}.{back}"
            )


def is_assumed(config: Any) -> bool:
    """Whether the definition of λ in a configuration is only that of the model's default source."""
    return getattr(config, "assumes_convention", False)


def _check(source: NoiseSource | None, adapter_name: str, convention: str | None, remedy: str) -> None:
    told = getattr(source, "convention", None)
    if source is not None and convention is not None and told != convention:
        raise ValueError(
            f"Adapter '{adapter_name}' was trained with λ defined as {convention!r}, but the source of λ tells "
            f"{told!r}, {remedy}"
        )
