"""The holder of an adapted model's cores: it sits at the model's root and makes C(λ) once a forward.

It is itself a PEFT tuner layer, because PEFT and Diffusers enable, freeze, activate, delete and move adapters by
walking over those. Data flows one way: λ → holder → channel → layers.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from nara_diffusion.cores.constant import IdentityCore
from nara_diffusion.noise.ablations import refuse_control
from nara_diffusion.noise.context import active_adapter_names, active_signals
from nara_diffusion.noise.denoiser import Denoiser
from nara_diffusion.noise.prediction import Prediction, check_scheduler_at_work
from nara_diffusion.noise.signals import Level, NoiseSignals, NoiseSource, as_signals
from nara_diffusion.noise.sources import first_source
from nara_diffusion.runtime.channel import CoreChannel, Frame
from nara_diffusion.runtime.checkpointing import checkpoint_with_core, checkpoint_without_core
from nara_diffusion.runtime.guards import check_not_fused
from nara_diffusion.runtime.offloading import KEEPS_COPY, keeps_cores_on_disk, onload_cores
from nara_diffusion.runtime.root_call import remove_root_call, set_root_call

from .batch_signals import of_one_sample
from .config import NaraConfig
from .core_set import SHARED, CoreSet, make_cores
from .noise_convention import check_convention
from .per_forward_cores import Cores, check_signals, depend_on_noise, frame_of_forward, frame_of_part
from .scheduled_cores import ScheduledCores, Strengths

HOLDER_NAME = "nara_core"
"""The attribute of the root that holds the cores: parameters are `nara_core.cores.{adapter}.{group}.…`."""

_MERGE_REMEDY = "Pass noise_level=…, or merge inside `with noise_level(model, value):`."


class CoreHolder(nn.Module, BaseTunerLayer):
    """Holds `cores[adapter][group]` for one adapted model and feeds its layers through `channel`.

    Adapters without a core of their own (identity) are listed too, so that PEFT's bookkeeping finds the same names
    here as on any layer; and plain LoRAs, while their strength depends on λ.

    Args:
        denoiser: what is known of the root's class, if it is a denoiser of Diffusers: then its timestep tells λ.
        convention: how the first adapter defines λ, if it says so.
    """

    is_core_holder = True
    adapter_layer_names = ("cores",)
    other_param_names = ("r", "density_radius", "convention", "undecided", "strengths")

    def __init__(self, denoiser: Denoiser | None = None, convention: str | None = None) -> None:
        super().__init__()
        self.cores = nn.ModuleDict()
        self.channel = CoreChannel(
            self._frame_of_part,
            self._check_merged_level,
            sample_major=denoiser is not None and denoiser.sample_major,
            one_level=denoiser is not None and (denoiser.one_level or denoiser.packed),
        )
        self.source: NoiseSource | None = first_source(denoiser, convention)
        self.source_is_default = True
        self.r: dict[str, int] = {}
        self.density_radius: dict[str, int] = {}
        self.convention: dict[str, str | None] = {}
        self.undecided: dict[str, NaraConfig] = {}
        self.strengths: dict[str, Strengths] = {}
        self.base_prediction: Prediction | None = None
        self.merged_adapters: list[str] = []
        self.merged_signals: NoiseSignals | None = None
        self.kept_on_disk = False
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self._handle: Any = None

    # ------------------------------------------------------------------ adapters

    def add(self, adapter_name: str, config: NaraConfig, ranks: dict[str, int], convention_stated: bool) -> None:
        """Make the cores of one adapter. `ranks`: group → the largest rank among its layers."""
        self.cores[adapter_name] = make_cores(config, ranks)
        self.r[adapter_name] = max(ranks.values(), default=config.r)
        self.know(adapter_name, config, convention_stated)

    def add_plain(self, adapter_name: str, rank: int) -> None:
        """Serve a plain LoRA, whose C = I, as long as its strength depends on λ."""
        self.cores[adapter_name] = CoreSet({SHARED: IdentityCore(rank)})
        self.r[adapter_name] = rank
        self.convention[adapter_name] = None

    def forget(self, adapter_name: str) -> None:
        """Drop all that is held of an adapter, whichever adapters are active."""
        for held in (getattr(self, name) for name in (*self.adapter_layer_names, *self.other_param_names)):
            if adapter_name in held:
                del held[adapter_name]

    def know(self, adapter_name: str, config: NaraConfig, convention_stated: bool) -> None:
        """Take over what `config` says of signals; by hotswap, instead of what another has said."""
        self.density_radius[adapter_name] = config.mask_density_radius
        self.convention[adapter_name] = config.noise_convention
        self.undecided.pop(adapter_name, None)
        if self.source_is_default and not convention_stated:
            self.undecided[adapter_name] = config

    def check_source(self, source: NoiseSource | None) -> None:
        """Raises ValueError if `source` speaks another convention than an adapter."""
        for adapter_name, convention in self.convention.items():
            if adapter_name not in self.undecided:
                check_convention(source, adapter_name, convention)

    def set_source(self, source: NoiseSource | None) -> None:
        """See `nara_diffusion.set_noise_source`. Adapters that took the default's convention follow."""
        self.check_source(source)
        self.source = source
        if source is None:
            return
        self.source_is_default = False
        for adapter_name in list(self.undecided):
            self._decide(adapter_name, getattr(source, "convention", None))

    def adopt_convention(self, convention: str) -> dict[str, str]:
        """Let adapters that serve, need λ and are undecided follow `convention`, as `set_source` does; unless one of
        them has another: adapter name → that.
        """
        told = [name for name in self._active() if self.depends_on_noise(name)]
        decided = {name: self.convention[name] for name in told if name not in self.undecided}
        others = {name: other for name, other in decided.items() if other not in (None, convention)}
        if not others:
            for adapter_name in self.undecided.keys() & told:
                self._decide(adapter_name, convention)
        return others  # type: ignore[return-value]

    def _decide(self, adapter_name: str, convention: str | None) -> None:
        config = self.undecided.pop(adapter_name)
        config.noise_convention = self.convention[adapter_name] = convention

    def _active(self) -> list[str]:
        """The adapters that take part in a forward now."""
        if self.disable_adapters:
            return []
        names = active_adapter_names(self.channel) or self.active_adapters
        return [name for name in dict.fromkeys(names) if name in self.cores and name not in self.merged_adapters]

    def _cores_of(self, names: list[str]) -> Cores:
        return {name: self._cores(name) for name in names}

    def _cores(self, adapter_name: str) -> CoreSet | ScheduledCores:
        cores: Any = self.cores[adapter_name]
        strengths = self.strengths.get(adapter_name)
        return cores if strengths is None else ScheduledCores(cores, strengths)

    def depends_on_noise(self, adapter_name: str) -> bool:
        """Whether the adapter is one that is served here, and its core or its strength needs λ."""
        return adapter_name in self.cores and self._cores(adapter_name).needs_noise

    @property
    def needs_noise(self) -> bool:
        return depend_on_noise(self._cores_of(self._active()))

    @property
    def density_radii(self) -> set[int]:
        return {self.density_radius[name] for name in self._active() if self.cores[name].needs_density}

    # ------------------------------------------------------------------ C(λ)

    def forward(self, x: Any) -> Any:
        """The identity: a root such as `nn.Sequential` calls its children, of which the holder is one."""
        return x

    def prepare_parts(self, root: nn.Module) -> None:
        """Let parts of `root` be called by themselves inside `noise_level`, which calls this as it begins.

        Raises:
            ValueError: attention uses a fused copy of base projections, past those that are adapted.
        """
        check_not_fused(root, self._active())
        self.kept_on_disk = keeps_cores_on_disk(root)
        if torch.is_grad_enabled():
            checkpoint_with_core(root, self.channel)

    def _frame_of_part(self) -> Frame | None:
        return frame_of_part(self._cores_of(self._active()), self.channel, self.kept_on_disk)

    # ------------------------------------------------------------------ merging at one λ

    def signals_to_merge(self, names: list[str], remedy: str = _MERGE_REMEDY) -> NoiseSignals | None:
        """The signals, of one sample, at which the named adapters are to be merged; None if they need none.

        Raises:
            ValueError: λ is not known, differs between samples, or is not that of what is merged already.
        """
        cores = self._cores_of(names)
        if not depend_on_noise(cores):
            return None
        refuse_control(self.channel)
        signals, merged = active_signals(self.channel) or self.merged_signals, self.merged_signals
        check_signals(cores, signals, f"a λ-dependent update can only be merged at one λ. {remedy}")
        signals = of_one_sample(signals)  # type: ignore[arg-type]
        if merged is not None and signals.noise_level.item() != merged.noise_level.item():
            raise ValueError(
                f"Adapters are merged at noise_level {merged.noise_level.item():.6g}, not "
                f"{signals.noise_level.item():.6g}: call unmerge_adapter() first."
            )
        return signals

    @torch.no_grad()
    def core_to_merge(self, adapter_name: str, group: str) -> Tensor:
        """C (1, r, r) for a layer that is being merged now. Its λ is then the only one to run at, until `unmerge`."""
        if self.kept_on_disk:
            raise ValueError(f"Adapter '{adapter_name}' cannot be merged: {KEEPS_COPY}")
        signals = self.signals_to_merge([adapter_name])
        if signals is not None:
            self.merged_signals = signals
            self.merge(adapter_names=[adapter_name])
        return self._cores(adapter_name).matrix(group, signals)

    # ------------------------------------------------------------------ export

    def signals_to_export(
        self, adapter_name: str, noise_level: Level | None, mask_density: Level | None = None
    ) -> NoiseSignals | None:
        """The signals, of one sample, at which the adapter is to be exported; None if it needs none.

        Args:
            noise_level: λ in [0, 1]; None takes that of `noise_level(…)`, or of what is merged.

        Raises:
            ValueError: λ or the mask density is needed and not known, or differs between samples.
        """
        cores = self._cores_of([adapter_name])
        if not depend_on_noise(cores):
            return None
        refuse_control(self.channel)
        if noise_level is None:
            signals = active_signals(self.channel) or self.merged_signals
        else:
            signals = as_signals(noise_level, mask_density)
        remedy = "pass noise_level=…, or export inside `with noise_level(model, value):`."
        check_signals(cores, signals, f"a plain LoRA is exact at one λ alone. {remedy}")
        return of_one_sample(signals)  # type: ignore[arg-type]

    @torch.no_grad()
    def core_to_export(self, key: tuple[str, str], signals: NoiseSignals | None) -> Tensor:
        """C (b or 1, r, r), times the strength, float32, of the layers that read by `key`."""
        adapter_name, group = key
        return self._cores(adapter_name).matrix(group, signals)

    # ------------------------------------------------------------------ the root's forward

    def attach(self, root: nn.Module) -> None:
        """Become a child of `root` and make C(λ) before each of its forwards. Harmless when repeated."""
        if getattr(root, HOLDER_NAME, None) is self:
            return
        setattr(root, HOLDER_NAME, self)
        self._handle = root.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        set_root_call(root, self.channel)

    def detach(self, root: nn.Module) -> None:
        """Leave `root` as it was before `attach`."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        remove_root_call(root)
        checkpoint_without_core(root, self.channel)
        delattr(root, HOLDER_NAME)

    @torch.compiler.disable(recursive=True)
    def _before_forward(self, root: nn.Module, args: Any, kwargs: Any) -> None:
        if not getattr(root, "peft_config", None):
            self.detach(root)  # adapters were unloaded by what does not know of cores
            return
        self.channel.begin(self._frame_for(root, args, kwargs))

    def _frame_for(self, root: nn.Module, args: Any, kwargs: Any) -> Frame:
        if self.merged and self.disable_adapters:
            unmerge_all(root)  # every layer of it, and not only those that this forward reaches
        elif self.merged:
            self._check_merged_level()
        names = self._active()
        check_scheduler_at_work(root.peft_config, names, self.base_prediction)  # type: ignore[arg-type]
        if not names:
            return {}
        if torch.is_grad_enabled():
            checkpoint_with_core(root, self.channel)
        check_not_fused(root, names)
        self.kept_on_disk = onload_cores(root)
        return frame_of_forward(self._cores_of(names), self.channel, self.source, root, args, kwargs)

    def _check_merged_level(self) -> None:
        signals, merged = active_signals(self.channel), self.merged_signals
        if signals is None or merged is None:
            return
        for name, given, fixed in zip(NoiseSignals._fields, signals, merged, strict=True):
            if given is not None and fixed is not None and not bool((given == fixed.to(given.device)).all()):
                raise ValueError(
                    f"The adapter is merged at {name} {fixed.item():.6g}, but this forward asks for "
                    f"{given.tolist()}: call unmerge_adapter() first."
                )

    # ------------------------------------------------------------------ BaseTunerLayer

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        names = self.active_adapters if adapter_names is None else adapter_names
        self.merged_adapters.extend(name for name in names if name in self.cores and name not in self.merged_adapters)

    def unmerge(self) -> None:
        self.merged_adapters.clear()
        self.merged_signals = None

    def set_scale(self, adapter: str, scale: float) -> None:
        """The scale s belongs to the layers; C has none."""

    def scale_layer(self, scale: float) -> None:
        """The scale s belongs to the layers; C has none."""

    def unscale_layer(self, scale: float | None = None) -> None:
        """The scale s belongs to the layers; C has none."""

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if device is not None and adapter_name in self.cores:
            self.cores[adapter_name].to(device)

    @property
    def weight(self) -> Tensor:
        raise AttributeError("A holder of cores wraps no layer, so it has no weight.")

    @property
    def bias(self) -> Tensor:
        raise AttributeError("A holder of cores wraps no layer, so it has no bias.")


def unmerge_all(root: nn.Module) -> None:
    """Take every merged adapter out of the base weights of the layers below `root`."""
    for module in root.modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            module.unmerge()
