"""The holder of an adapted model's cores: a plain module at the model's root, which makes C(λ) before each forward.

The layers alone know which adapters are active, merged, disabled or deleted, as PEFT and Diffusers leave them, and the
holder asks them. Of its own it has the cores, their strengths over λ, and the source of λ. An adapter that has left
`peft_config` loses its cores at the next forward, saving or adding; with the last one the holder and its hooks go. A
core is trainable while the A of its adapter is, wherever parameters are listed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from nara_diffusion.cores.registry import HOLDER_NAME, CoreSet
from nara_diffusion.cores.simple import IdentityCore
from nara_diffusion.layers.offloading import groups_of
from nara_diffusion.layers.variants import CoreChannel, Key
from nara_diffusion.noise.denoisers import Denoiser
from nara_diffusion.noise.level import entry_for
from nara_diffusion.noise.strength_schedule import StrengthSchedule

from .checkpointing import checkpoint_with_core, checkpoint_without_core
from .conventions import HasSource
from .inspection import ReadOutsideForwards
from .merging import MergesCores


class CoreHolder(HasSource, MergesCores, ReadOutsideForwards, nn.Module):
    """Owns `cores[adapter][group]` of one adapted model.

    It has each NaRA of the model, and a plain LoRA from the time on that its strength depends on λ.

    Args:
        root: the adapted model. denoiser: the entry of its class among Diffusers' denoisers.

    Attributes:
        configs: adapter → the configuration that its cores were made for.
        layers: adapter → the layers that it adapts, as PEFT made them.
        schedules: adapter → its strength over λ, if it has one.
        channel: hands C(λ) to the layers.
    """

    is_core_holder = True

    def __init__(self, root: nn.Module, denoiser: Denoiser | None = None) -> None:
        super().__init__()
        self.cores = nn.ModuleDict()
        self.configs: dict[str, Any] = {}
        self.layers: dict[str, list[Any]] = {}
        self.schedules: dict[str, StrengthSchedule] = {}
        self.channel = CoreChannel(
            self,
            sample_major=denoiser is not None and denoiser.sample_major,
            one_level=denoiser is not None and (denoiser.one_level or denoiser.packed),
        )
        self._root = (root,)  # in a tuple, so that it is no submodule
        self._handles: tuple[Any, ...] = ()
        self.init_source(denoiser)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "pipelines": []}  # which are not those of a copy

    @property
    def root(self) -> Any:
        """The adapted model."""
        return self._root[0]

    def forward(self, x: Any) -> Any:
        """Return `x`: a root such as `nn.Sequential` calls each of its children, and so the holder."""
        return x

    # ------------------------------------------------------------------ adapters

    def add(self, name: str, config: Any, cores: CoreSet, layers: list[Any]) -> None:
        """Add an adapter, or replace one. `layers`: those that it adapts."""
        self.cores[name] = cores
        self.configs[name], self.layers[name] = config, layers

    def drop_deleted(self) -> None:
        """Forget the adapters that have left `peft_config`, also if another one has come in their place."""
        present = getattr(self.root, "peft_config", {})
        for name in [
            name for name, config in self.configs.items() if present.get(name) is not config
        ]:
            self.remove(name)

    def remove(self, name: str) -> None:
        """Forget an adapter. One that is merged stays in the base weights."""
        self.schedules.pop(name, None)
        del self.cores[name], self.configs[name], self.layers[name]

    def reconfigure(self, name: str, config: Any) -> None:
        """Make `config` the configuration of an adapter that stays."""
        self.root.peft_config[name] = self.configs[name] = config

    def reading(self) -> list[str]:
        """The adapters whose C some layer would read now."""
        self.drop_deleted()
        return [
            name
            for name, layers in self.layers.items()
            if any(_reads(layer, name) for layer in layers)
        ]

    def merged_at(self) -> Tensor | None:
        """λ (1,) of merged layers; None if none is merged at a C that depends on λ."""
        variants = (
            layers[0].lora_variant.get(name) for name, layers in self.layers.items() if layers
        )
        levels = (getattr(variant, "merged_at", None) for variant in variants)
        return next((level for level in levels if level is not None), None)

    def merged_names(self) -> list[str]:
        """The adapters that are merged into the base weights."""
        return [
            name
            for name, layers in self.layers.items()
            if layers and name in layers[0].merged_adapters
        ]

    def follow_factors(self) -> None:
        """Make each core trainable if the A of its adapter is."""
        for name, layers in self.layers.items():
            cores: Any = self.cores[name]
            trainable = bool(layers) and _is_trainable(layers[0], name)
            for parameter in cores.parameters():
                if parameter.requires_grad != trainable:
                    parameter.requires_grad = trainable

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """As `nn.Module.named_modules`, by which all parameters are listed, those of the root too."""
        self.drop_deleted()
        self.follow_factors()
        return super().named_modules(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.drop_deleted()
        return super().state_dict(*args, **kwargs)

    # ------------------------------------------------------------------ what the adapters need

    def depends_on_noise(self, name: str) -> bool:
        """Whether the adapter has cores here, and one of them or a strength needs λ."""
        if name not in self.cores:
            return False
        cores: Any = self.cores[name]
        return cores.needs_noise or name in self.schedules

    @property
    def needs_noise(self) -> bool:
        """Whether a layer would read a C that depends on λ."""
        return any(map(self.depends_on_noise, self.reading()))

    # ------------------------------------------------------------------ hooks of the root

    def attach(self) -> None:
        """Become a child of the root, and make C(λ) before each of its forwards. Harmless when repeated."""
        if getattr(self.root, HOLDER_NAME, None) is self:
            return
        setattr(self.root, HOLDER_NAME, self)
        self._handles = (
            self.root.register_forward_pre_hook(_before_forward, with_kwargs=True),
            self.root.register_forward_hook(_after_forward, always_call=True),
        )

    def detach(self) -> None:
        """Undo `attach`."""
        for handle in self._handles:
            handle.remove()
        checkpoint_without_core(self.root, self.channel)
        self.root._modules.pop(HOLDER_NAME, None)

    def begin(self, args: Any, kwargs: Any) -> None:
        """Push C(λ) of what the layers will read in this forward of the root."""
        self.channel.local.pushed = None
        self.drop_deleted()
        is_disabled = all(
            layer.disable_adapters for layers in self.layers.values() for layer in layers[:1]
        )
        merged = (
            None if is_disabled else self.merged_at()
        )  # PEFT takes disabled ones out in this forward
        names = self.reading()
        self.check_prediction(names if merged is None else [*names, *self.merged_names()])
        if not getattr(self.root, "peft_config", None):
            self.detach()  # the adapters have been unloaded
            return
        self.follow_factors()
        if merged is not None:
            self.warn_of_merged(merged, args, kwargs)
        if not names:
            return
        if "_diffusers_hook" in vars(self.root):
            for group in groups_of(self.root):
                group.onload_()
        if torch.is_grad_enabled():
            checkpoint_with_core(self.root, self.channel)
        cores = self.make_cores(names, self.level_of_forward(names, args, kwargs))
        self.channel.push(entry_for(self), _beside_inputs(cores, args, kwargs))

    # ------------------------------------------------------------------ C(λ)

    def make_cores(self, names: list[str], level: Tensor | None) -> dict[Key, Tensor]:
        """Key → C (b or 1, r, r) for these adapters; layers read no C where it is I."""
        found = {}
        for name in names:
            cores: Any = self.cores[name]
            for group, core in cores.items():
                if name in self.schedules or not isinstance(core, IdentityCore):
                    found[name, group] = self.matrix((name, group), level)
        return found

    def matrix(self, key: Key, level: Tensor | None) -> Tensor:
        """C (b or 1, r, r), times the strength, float32, of the layers that read by `key`."""
        name, group = key
        cores: Any = self.cores[name]
        core, schedule = cores.matrix(group, level), self.schedules.get(name)
        if schedule is None:
            return core
        assert level is not None
        core = (
            core.to(level.device) if core.device.type == "cpu" else core
        )  # an identity has no weights
        return schedule.at(level.to(core.device))[:, None, None] * core


def holder_of(root: Any) -> CoreHolder | None:
    """The holder of the adapted model `root`; None if it has none."""
    holder = getattr(root, "_modules", {}).get(HOLDER_NAME)
    return holder if isinstance(holder, CoreHolder) else None


def drop_idle_holder(root: nn.Module) -> None:
    """Remove the holder of `root`, with its hooks and its source of λ, if it has no adapter left."""
    holder = holder_of(root)
    if holder is not None:
        holder.drop_deleted()
        if not holder.cores:
            holder.detach()


@torch.compiler.disable(recursive=True)
def _before_forward(root: nn.Module, args: Any, kwargs: Any) -> None:
    holder = holder_of(root)
    if holder is not None:
        holder.begin(args, kwargs)


@torch.compiler.disable(recursive=True)
def _after_forward(root: nn.Module, args: Any, output: Any) -> None:
    holder = holder_of(root)
    if holder is not None:
        holder.channel.local.pushed = None


def _reads(layer: LoraLayer, name: str) -> bool:
    return not layer.disable_adapters and not layer.merged and name in layer.active_adapters


def _is_trainable(layer: Any, name: str) -> bool:
    if name in layer.lora_A:
        return any(parameter.requires_grad for parameter in layer.lora_A[name].parameters())
    return name in layer.lora_embedding_A and layer.lora_embedding_A[name].requires_grad


def _beside_inputs(cores: dict[Key, Tensor], args: Any, kwargs: Any) -> dict[Key, Tensor]:
    """Move cores that are on the CPU to the device of a forward's first tensor, once and not again in each layer."""
    device = next(
        (value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None
    )
    if device is None or device.type == "cpu":
        return cores
    return {
        key: core.to(device) if core.device.type == "cpu" else core for key, core in cores.items()
    }
