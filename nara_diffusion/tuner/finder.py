"""Find λ for a model's forwards, and check that adapters are used as they were trained.

An adapter's configuration names its definition of λ. If it names none, the adapter takes the
definition of the source. Until the user sets a source, that definition is *assumed*, and a source
that is set later replaces it. The default source depends on the model's class and on the definition
of its first adapter. The length N of the noise schedule and the meaning of a small timestep come
from the schedulers of the pipelines that loaded adapters.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import replace
from enum import Enum, auto
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft import LoraConfig
from torch import Tensor, nn

from nara_diffusion.config import NaraConfig
from nara_diffusion.cores.core import needs_noise
from nara_diffusion.noise.blocks import LLADA2, BlockNoise
from nara_diffusion.noise.canvas_source import CanvasNoise
from nara_diffusion.noise.level import (
    BLOCK_SHARE,
    Entry,
    NoiseSource,
    as_level,
    backward_pass,
    registered_source,
)
from nara_diffusion.noise.parts import Parts
from nara_diffusion.noise.rows import ModelRows
from nara_diffusion.noise.timesteps import Denoiser, TimestepNoise

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from diffusers.schedulers.scheduling_utils import SchedulerMixin


class NotSet(Enum):
    """The value of `LevelFinder.given_source` until a user sets or removes a source.

    The value is an enum member because copying a member returns the same object.
    """

    DEFAULT = auto()


class LevelFinder:
    """Find λ for the forwards of one adapted model.

    Attributes:
        configs: configurations by adapter name. The core holder changes this dict in place.
        given_source: the source that `set_noise_source` has set; None if it was removed.
        usage: the pipelines that loaded adapters, and checks of how they use the adapters.
        length: N to use if no such pipeline is left, from the last pipeline or from training. None
            means 1000.
    """

    def __init__(
        self,
        root: nn.Module,
        configs: dict[str, LoraConfig],
        rows: ModelRows,
        denoiser: Denoiser | None,
    ) -> None:
        self.root = root
        self.configs = configs
        self.rows = rows
        self.denoiser = denoiser
        self.given_source: NoiseSource | NotSet | None = NotSet.DEFAULT
        self.length: int | None = None
        self.usage = Usage(configs)

    # ------------------------------------------------------------------ the source

    @property
    def source_is_default(self) -> bool:
        """Return True until the user sets or removes a source."""
        return self.given_source is NotSet.DEFAULT

    def present_source(self) -> NoiseSource | None:
        """Return the source of λ for forwards outside `noise_level(…)`, or None if there is none.

        N and the meaning of small timesteps come from the pipelines' current schedulers.
        """
        given = self.given_source
        if isinstance(given, TimestepNoise) and given.frames is None:
            given = copy(given)
            given.frames = self.rows.frames
        if given is not NotSet.DEFAULT:
            return given
        definitions = self._definitions()
        first = next(iter(definitions.values()), None)
        source = self._default_source(first)
        if not isinstance(source, Denoiser):
            return source
        schedulers = self.usage.schedulers()
        if schedulers:
            source = source.under(schedulers)
            self.length = source.num_train_timesteps
        elif self.length is not None:
            source = replace(source, num_train_timesteps=self.length)
        return source

    def _default_source(self, convention: str | None) -> NoiseSource | None:
        """Return the default source for the definition of λ in the first adapter, `convention`."""
        source = registered_source(convention)
        if source is None and self.denoiser is not None:
            source = self.denoiser.read_as(convention)
        if source is None and twins_of(self.root) is not None:
            return self.canvas_source
        if source is None and (convention == BLOCK_SHARE or _goes_by_blocks(self.root)):
            return self.block_source
        return source

    @cached_property
    def block_source(self) -> BlockNoise:
        """Return the default source of a LLaDA2 model, which follows LLaDA2Pipeline."""
        return BlockNoise(self.usage.schedulers)

    @cached_property
    def canvas_source(self) -> CanvasNoise:
        """Return the default source of a DiffusionGemma model, which follows its samplers."""
        return CanvasNoise(self.usage.schedulers)

    def add_pipeline(self, pipe: DiffusionPipeline) -> None:
        """Remember a pipeline that loaded an adapter."""
        self.usage.add_pipeline(pipe)
        if self.denoiser is None:
            self.block_source.ignore_past_runs()

    def block_masked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """Return a LLaDA2's arguments with a block mask if LLaDA2Pipeline calls it, else None."""
        has_blocks = BLOCK_SHARE in self._definitions().values() or _goes_by_blocks(self.root)
        if not (has_blocks and self.usage.pipelines):
            return None
        return self.block_source.with_block_mask(self.root, args, kwargs)

    def set_source(self, source: NoiseSource | None) -> None:
        """Set the source, or remove it if None, and replace assumed definitions of λ with its own."""
        self.given_source = source
        if source is None:
            return
        for config in self.configs.values():
            if isinstance(config, NaraConfig) and is_assumed(config):
                config.noise_convention = getattr(source, "convention", None)
                config.assumes_convention = False

    def check_source(self, source: NoiseSource | None) -> None:
        """Raise ValueError if `source` and an adapter define λ differently."""
        for name, convention in self._definitions().items():
            if not is_assumed(self.configs[name]):
                remedy = "so pass a source with that definition, or remove the adapter first."
                _check_definition(source, name, convention, remedy)

    # ------------------------------------------------------------------ λ of a forward

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
            source = self.present_source()
            level = None if source is None else as_level(source(self.root, args, kwargs), axes=2)
        elif entry.backward == backward_pass():
            level = entry.level
        else:
            raise ValueError(
                "A backward pass runs the whole adapted model again (a checkpoint function around it?), and the λ that "
                "is active now may not be that of the first run: enter `with noise_level(model, value):` inside the "
                "checkpointed function, or use the model's own `gradient_checkpointing_enable()`."
            )
        if level is None:
            raise unknown_level(self.root, names)
        is_for_all = entry is not None and level.numel() == 1
        self.usage.note_parts(self.root, names, level, is_for_all)
        if level.dim() == 2 and level.shape[1] > 1:
            parts = self.rows.parts_of_forward(level, self.root, args, kwargs)
            return parts.levels(level), parts
        level = level[:, 0] if level.dim() == 2 else level
        return self.rows.level_of_forward(level, self.root, args, kwargs), None

    # ------------------------------------------------------------------ adapters' definitions of λ

    def _definitions(self, but: str | None = None) -> dict[str, str]:
        """Return the definitions of λ by adapter name, without adapter `but`."""
        found = {}
        for name, config in self.configs.items():
            convention = convention_of(config)
            if convention is not None and name != but:
                found[name] = convention
        return found

    def with_convention(self, name: str, config: NaraConfig) -> NaraConfig:
        """Return a copy of `config` with the source's definition of λ, if the source has one.

        Args:
            name: the adapter's name. Its current configuration, if any, is ignored.
            config: the configuration of an adapter that will be added, or will replace the adapter
                with this name.

        Raises:
            ValueError: the adapter defines λ differently from the source.
        """
        own = config.noise_convention
        others = self._definitions(but=name)
        source = self.given_source
        if source is NotSet.DEFAULT:
            first = next(iter(others.values()), own)
            source = self._default_source(first)
        if not is_assumed(config):
            _check_definition(source, name, own, self._remedy(own, list(others)))
        config = copy(config)  # several models may share the original
        if source is not None and needs_noise(config) and (own is None or is_assumed(config)):
            config.noise_convention = getattr(source, "convention", None)
            config.assumes_convention = self.source_is_default
        elif own is None:
            config.assumes_convention = True
        return config

    def adopt_convention(self, names: Iterable[str], convention: str) -> dict[str, str]:
        """Give the adapters `names` this definition of λ if their current definition is assumed.

        Returns:
            The definitions, by adapter name, of the adapters with a different definition. If there
            are any, this method changes nothing.
        """
        others, assumed = {}, []
        for name in names:
            config = self.configs[name]
            own = convention_of(config)
            if isinstance(config, NaraConfig) and is_assumed(config):
                assumed.append(config)
            elif own is not None and own != convention:
                others[name] = own
        if not others:
            for config in assumed:
                config.noise_convention = convention
                config.assumes_convention = False
        return others

    def _remedy(self, convention: str | None, others: list[str]) -> str:
        """Return the end of the error message for different definitions of λ."""
        if others:
            return f"as {' and '.join(map(repr, others))} of this model needs: remove that first, or use another model."
        if not self.source_is_default:
            return f"which set_noise_source has set. Set one of {convention!r} before, set_noise_source(model, source)."
        return (
            "which is λ of this class of models. Add the adapter to the model that it was trained on; for a "
            "custom definition of λ, call register_noise_source(source) before the model's first adapter is added."
        )


def _goes_by_blocks(model: nn.Module) -> bool:
    """Return whether `model` is a LLaDA2, in this package's class or in its checkpoint's own class."""
    return getattr(getattr(model, "config", None), "model_type", None) == LLADA2


def is_assumed(config: LoraConfig) -> bool:
    """Return whether the configuration's definition of λ was only assumed from the default source."""
    return getattr(config, "assumes_convention", False)


def convention_of(config: LoraConfig) -> str | None:
    """Return the definition of λ in a configuration, or None if it has none, as in a plain LoRA."""
    return getattr(config, "noise_convention", None)


def unknown_level(root: nn.Module, names: list[str], remedy: str | None = None) -> ValueError:
    """Return the error for an unknown λ, with the usual remedy for a forward or another one."""
    usual = (
        "call the model inside `with noise_level(model, value):`, or let it read λ from its own inputs by "
        f"`set_noise_source(model, source)`.{_how_to_declare(root)}"
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


def _how_to_declare(root: nn.Module) -> str:
    """Return the end of the error for an unknown λ, which says how this model can get its λ."""
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


# ---------------------------------------------------------------------- how adapters are used

_KINDS = {"sample": "sample", "part": "part of a sample (a frame, a block)"}
"""`NaraConfig.noise_level_per` → its name in messages."""


class Usage:
    """Compare how the adapters of one model are used with how they were trained.

    `NaraConfig` records how a few-step adapter is sampled (`few_steps`), and whether training used
    one λ for each sample or for each part of a sample (`noise_level_per`). Each setting that
    differs causes one warning per adapter.

    Attributes:
        pipelines: weak references to the pipelines that loaded adapters.
    """

    def __init__(self, configs: dict[str, LoraConfig]) -> None:
        self.configs = configs
        self.pipelines: list[weakref.ref[DiffusionPipeline]] = []
        self._warned_of_sampling: dict[tuple[str, str], LoraConfig] = {}  # of (adapter, setting)
        self._warned_of_parts: dict[str, LoraConfig] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "pipelines": []}  # a copy has no pipelines

    # ------------------------------------------------------------------ the pipelines' schedulers

    def add_pipeline(self, pipe: DiffusionPipeline) -> None:
        """Remember a pipeline that loaded an adapter."""
        self.pipelines = [ref for ref in self.pipelines if ref() not in (None, pipe)]
        self.pipelines.append(weakref.ref(pipe))

    def schedulers(self) -> list[SchedulerMixin]:
        """Return the current schedulers of the pipelines that loaded adapters."""
        found = []
        for reference in self.pipelines:
            scheduler = getattr(reference(), "scheduler", None)
            if hasattr(scheduler, "config"):
                found.append(scheduler)
        return found

    def warn_of_sampling(self, names: Iterable[str]) -> None:
        """Warn once of each setting of a pipeline that does not suit a few-step adapter."""
        warned = self._warned_of_sampling
        for name in names:
            config = self.configs[name]
            few_steps = getattr(config, "few_steps", None)
            if few_steps is None:
                continue
            for reference in self.pipelines:
                pipe = reference()
                settings = {} if pipe is None else _other_settings(pipe, few_steps)
                if all(warned.get((name, setting)) is config for setting in settings):
                    continue
                warned |= {(name, setting): config for setting in settings}
                steps = few_steps["num_inference_steps"]
                call = f"pipe(…, num_inference_steps={steps}, guidance_scale=1)"
                remedy = "; ".join(filter(None, (few_steps.get("scheduler"), call)))
                warnings.warn(
                    f"Adapter '{name}' was trained to sample in {steps} steps, but the pipeline takes "
                    f"{', '.join(settings.values())}: {remedy}",
                    stacklevel=2,
                )

    # ------------------------------------------------------------------ samples or their parts

    def note_parts(
        self, root: nn.Module, names: Iterable[str], level: Tensor, is_for_all: bool
    ) -> None:
        """Record whether training uses λ per sample or per part, and warn once of the other use.

        An adapter that was trained with both counts as trained with λ per part.

        Args:
            level: λ (b,) of samples, or (b, k) of their k parts.
            is_for_all: True if a context sets one λ for all samples, which is valid for both.
        """
        now = "part" if level.dim() == 2 else "sample"
        for name in names:
            config = self.configs[name]
            if not isinstance(config, NaraConfig) or config.noise_level_per == now:
                continue
            before = config.noise_level_per
            is_known = is_for_all or self._warned_of_parts.get(name) is config
            if before is not None and not is_known:
                self._warned_of_parts[name] = config
                warnings.warn(
                    f"Adapter '{name}' was trained with λ for each {_KINDS[before]}, and this forward has one for "
                    f"each {_KINDS[now]}, which it has not seen: its results may be worse.",
                    UserWarning,
                    stacklevel=2,
                )
            if root.training and torch.is_grad_enabled() and before != "part":
                config.noise_level_per = now


TIMESTEP_SETTINGS = ("timestep_spacing", "shift_terminal")
"""Fields of a scheduler that a few-step adapter was trained with."""


def _other_settings(pipe: Any, few_steps: Mapping[str, Any]) -> dict[str, str]:
    """Return {setting: its value, for a message} of a pipeline that don't suit a few-step adapter."""
    scheduler = pipe.scheduler
    # the scheduler of a flow has no number before its first call
    steps = getattr(scheduler, "num_inference_steps", None)
    if steps is None:  # no call is in progress, as in training
        return {}
    settings = {}
    if steps != few_steps["num_inference_steps"]:
        settings["steps"] = f"{steps} steps"
    guidance = getattr(pipe, "_guidance_scale", 1.0)
    if guidance > 1:
        settings["guidance"] = f"guidance_scale {guidance:g}"
    for name in TIMESTEP_SETTINGS:
        trained = few_steps.get(name)
        if trained is not None and scheduler.config.get(name) != trained:
            settings["timesteps"] = f"{type(scheduler).__name__} with other timesteps"
    return settings


# ---------------------------------------------------------------------- a forward with two λ

_WITH_TWINS = "DiffusionGemmaModel"


class Twins(NamedTuple):
    """The encoder (at λ = 0) and the decoder (at λ) of a DiffusionGemma, and their parent module."""

    owner: nn.Module
    encoder: nn.Module
    decoder: nn.Module


def twins_of(root: nn.Module) -> Twins | None:
    """Return the twins of a DiffusionGemma, with or without PEFT's wrapper; None otherwise."""
    owner: nn.Module | None = root
    while isinstance(owner, nn.Module):
        if _WITH_TWINS in [kind.__name__ for kind in type(owner).__mro__]:
            return Twins(owner, owner.get_submodule("encoder"), owner.get_submodule("decoder"))
        owner = getattr(owner, "model", None)
    return None
