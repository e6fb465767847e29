"""The holder of an adapted model's cores: a child of the model's root, and a tuner layer of PEFT.

PEFT and Diffusers enable, freeze, activate, delete and move adapters by walking over tuner layers, and so they do it to
the cores too. `forward_hook` reads λ and makes C(λ) of the active cores; the layers read it from `channel`.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from nara_diffusion.config import NaraConfig
from nara_diffusion.cores.simple import IdentityCore
from nara_diffusion.noise.ablations import refuse_ablation
from nara_diffusion.noise.context import active_adapter_names, active_signals
from nara_diffusion.noise.denoisers.denoiser import Denoiser
from nara_diffusion.noise.schedulers.prediction import Prediction
from nara_diffusion.noise.signals import Level, NoiseSignals, as_signals
from nara_diffusion.runtime.channel import CoreChannel, PerForwardCores
from nara_diffusion.runtime.checkpointing import checkpoint_with_core
from nara_diffusion.runtime.guards import check_not_fused
from nara_diffusion.runtime.offloading import KEEPS_COPY, keeps_cores_on_disk
from nara_diffusion.tuner.strength.scheduled_cores import ScheduledCores, Strengths

from .batch_signals import of_one_sample
from .core_set import SHARED, CoreSet, make_cores
from .merged_level import MERGE_REMEDY, MergedLevel
from .noise_convention import NoiseConventions
from .per_forward_cores import AdapterCores, check_signals, cores_of_part, depend_on_noise

HOLDER_NAME = "nara_core"
"""The attribute of the root that holds the cores: parameters are `nara_core.cores.{adapter}.{group}.…`."""


class CoreHolder(nn.Module, BaseTunerLayer):
    """Owns `cores[adapter][group]` of one adapted model.

    It lists each adapter of the model, also one whose C is I, so that PEFT finds the same names here as on any layer.
    It lists a plain LoRA only while the strength of that LoRA depends on λ.

    Args:
        denoiser: the entry of the root's class among Diffusers' denoisers, which says how its timestep gives λ.
        convention: the `noise_convention` of the first adapter.

    Attributes:
        conventions: each adapter's definition of λ, and the source of λ.
        strengths: adapter → its strength as a function of λ, where it has one.
        merged_level: the λ at which adapters are merged.
        base_prediction: what the denoiser predicts while no active adapter carries a scheduler, if that is known.
        kept_on_disk: whether group offloading keeps the cores on disk between forwards.
    """

    is_core_holder = True
    adapter_layer_names = ("cores",)
    other_param_names = ("r", "density_radius", "strengths")

    def __init__(self, denoiser: Denoiser | None = None, convention: str | None = None) -> None:
        super().__init__()
        self.cores = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.density_radius: dict[str, int] = {}
        self.strengths: dict[str, Strengths] = {}
        self.channel = CoreChannel(
            self._cores_of_part,
            self.check_merged_level,
            sample_major=denoiser is not None and denoiser.sample_major,
            one_level=denoiser is not None and (denoiser.one_level or denoiser.packed),
        )
        self.conventions = NoiseConventions(denoiser, convention)
        self.merged_level = MergedLevel()
        self.base_prediction: Prediction | None = None
        self.kept_on_disk = False
        self.hook_handle: Any = None
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: list[str] = []

    def forward(self, x: Any) -> Any:
        """Return `x`: a root such as `nn.Sequential` calls each of its children, and so the holder."""
        return x

    # ------------------------------------------------------------------ adapters

    def add(self, adapter_name: str, config: NaraConfig, ranks: dict[str, int], convention_stated: bool) -> None:
        """Make the cores of one adapter. `ranks`: group → the largest rank among its layers."""
        self.cores[adapter_name] = make_cores(config, ranks)
        self.r[adapter_name] = max(ranks.values(), default=config.r)
        self.configure(adapter_name, config, convention_stated)

    def add_plain(self, adapter_name: str, rank: int) -> None:
        """Add a plain LoRA, whose C is I, because its strength depends on λ."""
        self.cores[adapter_name] = CoreSet({SHARED: IdentityCore(rank)})
        self.r[adapter_name] = rank

    def configure(self, adapter_name: str, config: NaraConfig, convention_stated: bool) -> None:
        """Set what `config` says of λ and the mask density; a hotswap replaces what the former adapter had."""
        self.density_radius[adapter_name] = config.mask_density_radius
        self.conventions.add(adapter_name, config, convention_stated)

    def forget(self, adapter_name: str) -> None:
        """Delete an adapter without changing which adapters are active."""
        for held in (getattr(self, name) for name in (*self.adapter_layer_names, *self.other_param_names)):
            if adapter_name in held:
                del held[adapter_name]
        self.conventions.forget(adapter_name)

    def active(self) -> list[str]:
        """The adapters that take part in a forward now."""
        if self.disable_adapters:
            return []
        names = active_adapter_names(self.channel) or self.active_adapters
        return [name for name in dict.fromkeys(names) if name in self.cores and name not in self.merged_adapters]

    def cores_of(self, adapter_names: list[str]) -> AdapterCores:
        """The cores of these adapters, at their strengths."""
        return {name: self._cores(name) for name in adapter_names}

    def _cores(self, adapter_name: str) -> CoreSet | ScheduledCores:
        cores: Any = self.cores[adapter_name]
        strengths = self.strengths.get(adapter_name)
        return cores if strengths is None else ScheduledCores(cores, strengths)

    # ------------------------------------------------------------------ what the adapters need

    def depends_on_noise(self, adapter_name: str) -> bool:
        """Whether the adapter has cores here, and its core or its strength needs λ."""
        return adapter_name in self.cores and self._cores(adapter_name).needs_noise

    @property
    def needs_noise(self) -> bool:
        """Whether an active adapter needs λ."""
        return depend_on_noise(self.cores_of(self.active()))

    @property
    def density_radii(self) -> set[int]:
        """The radii of the mask densities that the active adapters read."""
        return {self.density_radius[name] for name in self.active() if self.cores[name].needs_density}

    def adopt_convention(self, convention: str) -> dict[str, str]:
        """Give the active, λ-dependent adapters this definition of λ where they have none: see `NoiseConventions`."""
        return self.conventions.adopt(convention, [name for name in self.active() if self.depends_on_noise(name)])

    # ------------------------------------------------------------------ parts of the root

    def prepare_parts(self, root: nn.Module) -> None:
        """Prepare `root` so that its parts may be called by themselves: `noise_level` does so on entry.

        Raises:
            ValueError: attention uses a fused copy of base projections, so that adapted ones would have no effect.
        """
        check_not_fused(root, self.active())
        self.kept_on_disk = keeps_cores_on_disk(root)
        if torch.is_grad_enabled():
            checkpoint_with_core(root, self.channel)

    def _cores_of_part(self) -> PerForwardCores | None:
        return cores_of_part(self.cores_of(self.active()), self.channel, self.kept_on_disk)

    # ------------------------------------------------------------------ merging

    def signals_to_merge(self, adapter_names: list[str], remedy: str = MERGE_REMEDY) -> NoiseSignals | None:
        """The signals, of one sample, at which these adapters are merged; None if they need none.

        Raises:
            ValueError: an ablation is active; or see `MergedLevel.choose`.
        """
        cores = self.cores_of(adapter_names)
        if depend_on_noise(cores):
            refuse_ablation(self.channel)
        return self.merged_level.choose(cores, active_signals(self.channel), remedy)

    @torch.no_grad()
    def core_to_merge(self, adapter_name: str, group: str) -> Tensor:
        """C (1, r, r) for a layer that is being merged. Its λ is the only one to run at until `unmerge`."""
        if self.kept_on_disk:
            raise ValueError(f"Adapter '{adapter_name}' cannot be merged: {KEEPS_COPY}")
        signals = self.signals_to_merge([adapter_name])
        if signals is not None:
            self.merged_level.signals = signals
            self.merge(adapter_names=[adapter_name])
        return self._cores(adapter_name).matrix(group, signals)

    def check_merged_level(self) -> None:
        """Raises ValueError if `noise_level(…)` gives another λ than that of the merged adapters.

        Beside fused ones it may be there for others.
        """
        if not (self.merged_level.is_fused and self.needs_noise):
            self.merged_level.check(active_signals(self.channel))

    def warn_of_merged_level(self, root: nn.Module, args: Any, kwargs: Any) -> None:
        """Say once if this forward of `root` has another λ, by the source, than that of the merged adapters."""
        source, merged = self.conventions.source, self.merged_level
        if source is None or not merged.is_binding or merged.is_warned_of or active_signals(self.channel) is not None:
            return
        try:
            told = as_signals(*source(root, args, kwargs))
        except ValueError:  # a source that can't tell λ here is needed by none
            return
        merged.warn_of(told.noise_level)

    # ------------------------------------------------------------------ export

    def signals_to_export(
        self, adapter_name: str, noise_level: Level | None, mask_density: Level | None = None
    ) -> NoiseSignals | None:
        """The signals, of one sample, at which the adapter is exported; None if it needs none.

        Args:
            noise_level: λ in [0, 1]; None takes that of `noise_level(…)`, or of the merged adapters.

        Raises:
            ValueError: λ or the mask density is needed and not known, or differs between samples.
        """
        cores = self.cores_of([adapter_name])
        if not depend_on_noise(cores):
            return None
        refuse_ablation(self.channel)
        if noise_level is None:
            signals = active_signals(self.channel) or self.merged_level.signals
        else:
            signals = as_signals(noise_level, mask_density)
        remedy = "Pass noise_level=…, or export inside `with noise_level(model, value):`."
        check_signals(cores, signals, f"a plain LoRA is exact at one λ alone. {remedy}")
        return of_one_sample(signals)  # type: ignore[arg-type]

    @torch.no_grad()
    def core_to_export(self, key: tuple[str, str], signals: NoiseSignals | None) -> Tensor:
        """C (b or 1, r, r), times the strength, float32, of the layers that read by `key`."""
        adapter_name, group = key
        return self._cores(adapter_name).matrix(group, signals)

    # ------------------------------------------------------------------ BaseTunerLayer

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.conventions.forget(adapter_name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        names = self.active_adapters if adapter_names is None else adapter_names
        self.merged_adapters.extend(name for name in names if name in self.cores and name not in self.merged_adapters)

    def unmerge(self) -> None:
        self.merged_adapters.clear()
        self.merged_level = MergedLevel()

    def set_scale(self, adapter: str, scale: float) -> None:
        """Do nothing: the scale s belongs to the layers."""

    def scale_layer(self, scale: float) -> None:
        """Do nothing: the scale s belongs to the layers."""

    def unscale_layer(self, scale: float | None = None) -> None:
        """Do nothing: the scale s belongs to the layers."""

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if device is not None and adapter_name in self.cores:
            self.cores[adapter_name].to(device)

    @property
    def weight(self) -> Tensor:
        raise AttributeError("A CoreHolder adapts no layer, so it has no weight.")

    @property
    def bias(self) -> Tensor:
        raise AttributeError("A CoreHolder adapts no layer, so it has no bias.")


def holder_of(root: Any) -> CoreHolder | None:
    """The holder of the adapted model `root`; None if it has none."""
    holder = getattr(root, HOLDER_NAME, None)
    return holder if isinstance(holder, CoreHolder) else None
