"""Find λ for a model's forwards, and check that adapters are used as they were trained.

An adapter's configuration names its definition of λ. If it names none, the adapter takes the
definition of the source. Until the user sets a source, that definition is *assumed*, and a source
that is set later replaces it. The default source depends on the model's class and on the definition
of its first adapter. The length N of the noise schedule and the meaning of a small timestep come
from the schedulers of the pipelines that loaded adapters.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from copy import copy
from dataclasses import replace
from types import EllipsisType
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from peft import LoraConfig
from torch import Tensor, nn

from nara_diffusion.config import NaraConfig
from nara_diffusion.cores.registry import needs_noise
from nara_diffusion.noise.context import Entry
from nara_diffusion.noise.denoisers import source_of_class
from nara_diffusion.noise.level import as_level
from nara_diffusion.noise.parts import Parts
from nara_diffusion.noise.rows import ModelRows
from nara_diffusion.noise.sources import NoiseSource, registered
from nara_diffusion.noise.timesteps import DenoiserNoise, TimestepNoise

from .adapted_forwards import BlockForwards, forwards_of
from .usage import Usage

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


_KINDS = {"sample": "sample", "part": "part of a sample (a frame, a block)"}
"""`NaraConfig.noise_level_per` → its name in messages."""


class LevelFinder:
    """Find λ for the forwards of one adapted model.

    Attributes:
        configs: configurations by adapter name. The core holder changes this dict in place.
        class_source: the source that the table has for the class of the root.
        rows: how the layers of the root see its batch.
        given_source: the source that `set_noise_source` has set; None if it was removed, and `...`
            until a user does either.
        usage: the pipelines that loaded adapters, and checks of how they use the adapters.
        forwards: which forwards get C, and what the model refuses.
        length: N to use if no such pipeline is left, from the last pipeline or from training. None
            means 1000.
    """

    def __init__(self, root: nn.Module, configs: dict[str, LoraConfig]) -> None:
        self.root = root
        self.configs = configs
        source = self.class_source = source_of_class(root)
        self.rows = ModelRows() if source is None else ModelRows(source, is_denoiser=True)
        self.given_source: NoiseSource | EllipsisType | None = ...
        self.length: int | None = None
        self._warned: dict[str, LoraConfig] = {}  # of adapters that are used in another way
        self.usage = Usage(configs)
        self.forwards = forwards_of(root, self.usage.schedulers)

    @property
    def source_is_default(self) -> bool:
        """Return True until the user sets or removes a source."""
        return self.given_source is ...

    def present_source(self) -> NoiseSource | None:
        """Return the source of λ for forwards outside `noise_level(…)`, or None if there is none.

        N and the meaning of small timesteps come from the pipelines' current schedulers.
        """
        source, frames = self.given_source, self.rows.source.frames
        if source is not ...:
            if frames is not None and isinstance(source, TimestepNoise) and source.frames is None:
                source = copy(source)
                source.frames = frames
            return source
        source = self._default_source(next(iter(self._definitions().values()), None))
        if not isinstance(source, DenoiserNoise):
            return source
        schedulers = self.usage.schedulers() if self.usage.pipelines else []
        if schedulers:
            return source.under(schedulers)
        return source if self.length is None else replace(source, num_train_timesteps=self.length)

    def _default_source(self, convention: str | None) -> NoiseSource | None:
        """Return the default source for the definition of λ in the first adapter, `convention`."""
        source = registered.get(convention or "")
        if source is None and self.class_source is not None:
            source = self.class_source.read_as(convention)
        return self.forwards.source if source is None else source

    def add_pipeline(self, pipe: DiffusionPipeline) -> None:
        """Remember a pipeline that loaded an adapter."""
        self.usage.pipelines.add(pipe)
        if isinstance(self.forwards, BlockForwards):
            self.forwards.source.ignore_past_runs()

    def set_source(self, source: NoiseSource | None) -> None:
        """Set the source, or remove it if None, and replace assumed definitions of λ with its own."""
        self.given_source = source
        if source is not None:
            self.adopt_convention(self.configs, getattr(source, "convention", None))

    def check_source(self, source: NoiseSource | None) -> None:
        """Raise ValueError if `source` and an adapter define λ differently."""
        for name, convention in self._definitions().items():
            if not is_assumed(self.configs[name]):
                remedy = "so pass a source with that definition, or remove the adapter first."
                _check_definition(source, name, convention, remedy)

    def level_of_forward(
        self, names: list[str], entry: Entry | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Parts | None]:
        """Return λ (1,), (b,) or (b·k,) for a forward of the root, and the parts, if any.

        Args:
            names: the adapters that are active in the forward and depend on λ.
            entry: the context `noise_level(…)` around the forward; None to call the source.

        Raises:
            ValueError: λ is unknown, λ may belong to another forward, or the layers cannot tell
                samples apart.
        """
        if entry is None:
            level = self.level_of_source(args, kwargs)
        elif entry.backward == torch._C._current_graph_task_id():
            level = entry.level
        else:
            raise ValueError(
                "A backward pass runs the whole adapted model again (a checkpoint function around it?), and the λ that "
                "is active now may not be that of the first run: enter `with noise_level(model, value):` inside the "
                "checkpointed function, or use the model's own `gradient_checkpointing_enable()`."
            )
        if level is None:
            raise unknown_level(self.root, names)
        if entry is None or level.numel() > 1:  # one value of a context is valid for all parts
            self._warn_of_other_training(names, "part" if level.dim() == 2 else "sample")
        if level.dim() == 2 and level.shape[1] > 1:
            parts = self.rows.parts_of_forward(level, self.root, args, kwargs)
            return parts.levels(level), parts
        return self.rows.level_of_forward(level.flatten(), self.root, args, kwargs), None

    def level_of_source(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Return λ (1,), (b,) or (b, k) that the source computes for a forward; None without a source."""
        source = self.present_source()
        if isinstance(source, DenoiserNoise) and source.schedulers:
            self.length = source.num_train_timesteps  # the pipelines may go before the model
        return None if source is None else as_level(source(self.root, args, kwargs), axes=2)

    def _warn_of_other_training(self, names: Iterable[str], per: str) -> None:
        """Warn once of each adapter that was trained with λ per sample and is used per part, or vice versa.

        Args:
            per: what has one λ in the present forward, "sample" or "part".
        """
        for name in names:
            config = self.configs[name]
            trained = getattr(config, "noise_level_per", None)
            if trained in (None, per) or self._warned.get(name) is config:
                continue
            self._warned[name] = config
            warnings.warn(
                f"Adapter '{name}' was trained with one λ for each {_KINDS[trained]}. This forward has one for each "
                f"{_KINDS[per]}, which the adapter hasn't seen, so its results may be worse.",
                UserWarning,
                stacklevel=2,
            )

    def _definitions(self) -> dict[str, str]:
        """Return the definitions of λ by adapter name; a plain LoRA has none."""
        conventions = {
            name: getattr(config, "noise_convention", None) for name, config in self.configs.items()
        }
        return {name: defined for name, defined in conventions.items() if defined is not None}

    def with_convention(self, name: str, config: NaraConfig) -> NaraConfig:
        """Return a copy of `config` with the source's definition of λ, if the source has one.

        Args:
            name: the adapter's name. Its current configuration, if any, is ignored.
            config: the configuration of an adapter that will be added, or will replace the adapter
                with this name.

        Raises:
            ValueError: the adapter defines λ differently from the source.
        """
        convention = config.noise_convention
        definitions = self._definitions()
        definitions.pop(name, None)
        source = self.given_source
        if source is ...:
            first = next(iter(definitions.values()), convention)
            source = self._default_source(first)
        if not is_assumed(config):
            _check_definition(source, name, convention, self._remedy(convention, list(definitions)))
        config = copy(config)  # several models may share the original
        if (
            source is not None
            and needs_noise(config)
            and (convention is None or is_assumed(config))
        ):
            config.noise_convention = getattr(source, "convention", None)
            config.assumes_convention = self.source_is_default
        elif convention is None:
            config.assumes_convention = True
        return config

    def adopt_convention(self, names: Iterable[str], convention: str | None) -> dict[str, str]:
        """Give the adapters `names` this definition of λ if their current definition is assumed.

        Returns:
            The definitions, by adapter name, of the adapters with a different definition. If there
            are any, this method changes nothing.
        """
        configs = {name: self.configs[name] for name in names}
        different = {
            name: defined
            for name, defined in self._definitions().items()
            if name in configs and defined != convention and not is_assumed(configs[name])
        }
        for config in configs.values() if not different else ():
            if is_assumed(config):
                config.noise_convention = convention
                config.assumes_convention = False
        return different

    def _remedy(self, convention: str | None, others: list[str]) -> str:
        """Return the end of the error message for different definitions of λ."""
        if others:
            return f"as {' and '.join(map(repr, others))} of this model needs. Remove that first, or use another model."
        if not self.source_is_default:
            return f"which set_noise_source has set. Set one of {convention!r} first: set_noise_source(model, source)."
        return (
            "the definition of this class of models. Add the adapter to the model that it was trained on; for a "
            "custom definition of λ, call register_noise_source(source) before the model's first adapter is added."
        )


def is_assumed(config: LoraConfig) -> TypeGuard[NaraConfig]:
    """Return whether the configuration's definition of λ was only assumed from the default source."""
    return isinstance(config, NaraConfig) and config.assumes_convention


def unknown_level(root: nn.Module, names: list[str], remedy: str | None = None) -> ValueError:
    """Return the error for an unknown λ, with the usual remedy for a forward or another one."""
    kinds = [kind.__name__ for kind in type(root).__mro__]
    is_masked = getattr(getattr(root, "config", None), "mask_token_id", None) is not None
    declaration = ""
    if "ModelMixin" in kinds:  # of Diffusers
        declaration = (
            " To have it read its timestep, declare "
            f"register_denoiser('{kinds[0]}', meaning) before adding adapters."
        )
    elif is_masked or ("PreTrainedModel" in kinds and "LM" in kinds[0]):
        declaration = (
            " A masked language model reads it inside `with read_noise_from_input_ids(model, "
            "prompt_lengths):` of nara_diffusion.dllm."
        )
    usual = (
        "call the model inside `with noise_level(model, value):`, or let it read λ from its own inputs by "
        f"`set_noise_source(model, source)`.{declaration}"
    )
    listed = ", ".join(map(repr, names))
    return ValueError(f"λ is not known, but adapter(s) {listed} depend on it: {remedy or usual}")


def _check_definition(
    source: NoiseSource | None, adapter_name: str, convention: str | None, remedy: str
) -> None:
    of_source = getattr(source, "convention", None)
    if source is not None and convention is not None and of_source != convention:
        raise ValueError(
            f"Adapter '{adapter_name}' was trained with λ defined as {convention!r}, but the source of λ gives "
            f"{of_source!r}, {remedy}"
        )
