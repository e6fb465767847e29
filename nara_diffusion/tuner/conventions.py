"""Where a model's λ comes from, and whether that is λ as its adapters were trained with it.

An adapter's configuration names its definition of λ. One that names none takes that of the source; until a user sets a
source, it is *assumed*, and that source decides. The default source follows from the model's class and the first
definition. N, and what a small timestep means, come from the present scheduler of the pipelines that loaded the
adapters.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from copy import copy
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from nara_diffusion.cores.registry import needs_noise
from nara_diffusion.layers.variants import CoreChannel
from nara_diffusion.noise.denoisers import Denoiser, first_source
from nara_diffusion.noise.level import (
    NoiseSource,
    arguments_of,
    as_level,
    backward_pass,
    entry_for,
    outer_modules,
)
from nara_diffusion.noise.prediction import check_expected


class _DEFAULT:
    """In the place of a source, as long as no user has set or removed one; a class, so that copies keep it."""


class HasSource:
    """The source of λ of a holder of cores.

    Attributes:
        given_source: that of `set_noise_source`, None if it was removed, `_DEFAULT` before.
        pipelines: weak references to the pipelines that loaded adapters.
        length: N where there is no such pipeline: that of the last one, or of a training; None for 1000.
    """

    root: Any
    configs: dict[str, Any]
    channel: CoreChannel
    reading: Any
    depends_on_noise: Any

    def init_source(self, denoiser: Denoiser | None) -> None:
        self.denoiser = denoiser
        self.given_source: Any = _DEFAULT
        self.length: int | None = None
        self.pipelines: list[weakref.ref[Any]] = []

    @property
    def source_is_default(self) -> bool:
        return self.given_source is _DEFAULT

    def present_source(self) -> NoiseSource | None:
        """Tells λ to forwards outside of `noise_level(…)`, with N and the meaning of small timesteps of the pipelines'
        present schedulers; None if nothing does."""
        if not self.source_is_default:
            return self.given_source
        source, schedulers = (
            first_source(self.denoiser, next(iter(self._defined().values()), None)),
            self.schedulers(),
        )
        if isinstance(source, Denoiser) and schedulers:
            source = source.under(schedulers)
            self.length = source.num_train_timesteps
        elif isinstance(source, Denoiser) and self.length is not None:
            source = replace(source, num_train_timesteps=self.length)
        return source

    def set_source(self, source: NoiseSource | None) -> None:
        """See `nara_diffusion.set_noise_source`. Assumed definitions become that of `source`."""
        self.given_source = source
        for config in self.configs.values() if source is not None else ():
            if is_assumed(config):
                config.noise_convention = getattr(source, "convention", None)
                config.assumes_convention = False

    def check_source(self, source: NoiseSource | None) -> None:
        """Raises ValueError if `source` and an adapter define λ differently."""
        for name, convention in self._defined().items():
            if not is_assumed(self.configs[name]):
                _check(
                    source,
                    name,
                    convention,
                    "so pass one that tells it so, or remove the adapter first.",
                )

    # ------------------------------------------------------------------ λ of a forward

    def level_of_forward(self, names: list[str], args: Any, kwargs: Any) -> Tensor | None:
        """λ (1,) or (b,) for a forward of the root; None where none of these adapters needs it."""
        entry = entry_for(self)
        if not any(map(self.depends_on_noise, names)):
            return None
        if entry is not None and entry.backward != backward_pass():
            raise ValueError(
                "A backward pass runs the whole adapted model again (a checkpoint function around it?), and the λ that "
                "is active now may not be that of the first run: enter `with noise_level(model, value):` inside the "
                "checkpointed function, or use the model's own `gradient_checkpointing_enable()`."
            )
        source = self.present_source() if entry is None else None
        level = entry.level if entry is not None else None
        if source is not None:
            level = as_level(source(self.root, args, kwargs))
        self.check_known(names, level)
        if level is not None and len(level) > 1:
            self._check_rows(len(level), args, kwargs)
        return level

    def _check_rows(self, values: int, args: Any, kwargs: Any) -> None:
        """Refuse several values of λ which layers of this class of models can't tell apart: these see no samples first,
        or they may see multiples of the batch, and there is not one value a row of the root's first tensor."""
        kind = type(self.root).__name__
        if self.channel.one_level:
            raise ValueError(
                f"noise_level has {values} values, but the layers of {kind} see tokens where others see samples, so "
                "that each cannot get its own C: let the batch share one λ, or run its samples one by one."
            )
        if not self.channel.sample_major:
            return
        given = arguments_of(self.root, args, kwargs).values()
        batch = next((len(one) for one in given if isinstance(one, Tensor) and one.dim() > 0), None)
        if values != batch:
            raise ValueError(
                f"noise_level has {values} values, but the batch is {batch}: pass one value, or one a sample of the "
                "batch as the model sees it (after CFG or repeats)."
            )
        if any(map(_splits_batch, outer_modules(self.root))):
            raise ValueError(
                f"noise_level has {values} values, but blocks of {kind} run on slices of the batch (forward chunking, "
                "or FreeNoise's split inference), whose samples cannot be told apart: pass one λ for the whole batch, "
                "or turn that off (chunking along dim=1 is fine)."
            )

    def check_known(
        self, names: list[str], level: Tensor | None, remedy: str | None = None
    ) -> None:
        """Raises ValueError if λ is not known, and these adapters need it; `remedy`: the end, if not the usual."""
        noisy = [name for name in names if self.depends_on_noise(name)] if level is None else []
        if noisy:
            usual = (
                "call the model inside `with noise_level(model, value):`, or let it read λ from its own inputs by "
                f"`set_noise_source(model, source)`.{_how_to_declare(self.root)}"
            )
            raise ValueError(
                f"λ is not known, but adapter(s) {', '.join(map(repr, noisy))} depend on it: {remedy or usual}"
            )

    # ------------------------------------------------------------------ the adapters' definitions of λ

    def _defined(self, but: str | None = None) -> dict[str, str]:
        """Adapter → its definition of λ, of those that have one."""
        conventions = {
            name: getattr(config, "noise_convention", None) for name, config in self.configs.items()
        }
        return {
            name: each for name, each in conventions.items() if each is not None and name != but
        }

    def complete(self, name: str, config: Any) -> Any:
        """A copy of `config` of an adapter to be added, or to take the place of that of this name, with its definition,
        which has to be that of the source."""
        others, own = self._defined(but=name), config.noise_convention
        first = next(iter(others.values()), own)
        source = first_source(self.denoiser, first) if self.source_is_default else self.given_source
        if not is_assumed(config):
            _check(source, name, own, self._remedy(own, list(others)))
        config = copy(config)  # the caller's may serve several models
        if source is not None and needs_noise(config) and (own is None or is_assumed(config)):
            config.noise_convention = getattr(source, "convention", None)
            config.assumes_convention = self.source_is_default
        elif own is None:
            config.assumes_convention = True
        return config

    def adopt_convention(self, convention: str) -> dict[str, str]:
        """Give the active, λ-dependent adapters whose definition is assumed this one, unless some have another: returns
        these, adapter → its definition."""
        configs = {
            name: self.configs[name] for name in self.reading() if self.depends_on_noise(name)
        }
        sure = {
            n: getattr(c, "noise_convention", None) for n, c in configs.items() if not is_assumed(c)
        }
        others = {name: each for name, each in sure.items() if each not in (None, convention)}
        for config in [] if others else configs.values():
            if is_assumed(config):
                config.noise_convention, config.assumes_convention = convention, False
        return others

    def _remedy(self, convention: str | None, others: list[str]) -> str:
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
        """Raise ValueError if a pipeline's scheduler expects another prediction than that of the adapters `names`."""
        configs = getattr(self.root, "peft_config", {})
        for fields in (getattr(configs.get(name), "scheduler", None) for name in names):
            for scheduler in self.schedulers() if fields is not None else ():
                check_expected(scheduler, fields)


def is_assumed(config: Any) -> bool:
    """Whether the definition of λ in a configuration is only that of the model's default source."""
    return getattr(config, "assumes_convention", False)


def _check(
    source: NoiseSource | None, adapter_name: str, convention: str | None, remedy: str
) -> None:
    told = getattr(source, "convention", None)
    if source is not None and convention is not None and told != convention:
        raise ValueError(
            f"Adapter '{adapter_name}' was trained with λ defined as {convention!r}, but the source of λ tells "
            f"{told!r}, {remedy}"
        )


def _splits_batch(module: nn.Module) -> bool:
    own = vars(module)
    chunked = own.get("_chunk_size") is not None and own.get("_chunk_dim") == 0
    return chunked or (
        type(module).__name__ == "SplitInferenceModule" and own.get("split_dim") == 0
    )


def _how_to_declare(root: nn.Module) -> str:
    """The end of the error of an unknown λ: what reads it from the inputs of models of this class."""
    kinds = [kind.__name__ for kind in type(root).__mro__]
    if "ModelMixin" in kinds:  # of Diffusers
        declaration = f"register_denoiser('{kinds[0]}', meaning)"
        return f" To have it read its timestep, declare {declaration} before adding adapters."
    is_masked = getattr(getattr(root, "config", None), "mask_token_id", None) is not None
    if is_masked or ("PreTrainedModel" in kinds and "LM" in kinds[0]):
        return (
            " A masked language model reads it inside `with read_noise_from_input_ids(model, prompt_lengths):` of "
            "nara_diffusion.dllm."
        )
    return ""
