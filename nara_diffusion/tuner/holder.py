"""Hold the cores of an adapted model at its root, and compute D(λ) for each forward.

    D(λ) = C(λ) − I                             (b or 1, r, r), float32, for λ (b,)
    D' = σ(λ) C(λ) − I = σ D + (σ − 1) I        for an adapter with a strength σ

The holder owns the cores and their strengths, and passes D to the layers, also when a gradient
checkpoint recomputes a block. PEFT or Diffusers may change the adapters at any time, and only
PEFT's layers know which adapters are active, merged, disabled or deleted, so the holder asks them.

If an adapter is no longer in `peft_config`, its cores are not listed any more, and the next forward,
save or addition removes them. If it was the last adapter, the holder and its hooks are removed too.
A core is trainable while the A of its adapter is trainable: PEFT switches both, since the first
layer of an adapter names the cores among its own modules (`adapter_layer_names`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nara_diffusion.cores.core import Core
from nara_diffusion.cores.core_set import HOLDER_NAME, CoreSet
from nara_diffusion.cores.other_cores import IdentityCore
from nara_diffusion.layers.adapted_layer import AdaptedLayer
from nara_diffusion.layers.channel import CoreChannel, Key, Pushed
from nara_diffusion.layers.offloading import in_memory, onload_groups
from nara_diffusion.noise.context import Entry, backward_pass, present
from nara_diffusion.noise.parts import Parts
from nara_diffusion.noise.strength_schedule import StrengthSchedule

from .checkpointing import pass_cores, pass_no_cores
from .finder import LevelFinder
from .merging import Merging

_CORES_OF_LAYER = "nara_cores"
"""The attribute of an adapter's first layer that names its cores: {adapter: cores}."""


class CoreHolder(nn.Module):
    """Own the cores of one adapted model, `cores[adapter][group]`.

    Each NaRA has an entry. A plain LoRA has an entry only while its strength depends on λ.

    Args:
        root: the adapted model.

    Attributes:
        configs: the configuration of each adapter, by name, at the time its cores were made.
        layers: the PEFT layers of each adapter, by name.
        schedules: the strength over λ of each adapter that has one, by name.
        channel: the channel that passes D(λ) to the layers.
        finder: the object that finds λ for a forward.
        merging: the object that finds and compares the λ of merged layers.
    """

    is_core_holder = True

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.cores = nn.ModuleDict()
        self.configs: dict[str, LoraConfig] = {}
        self.layers: dict[str, list[LoraLayer]] = {}
        self.schedules: dict[str, StrengthSchedule] = {}
        self.finder = LevelFinder(root, self.configs)
        self.channel = CoreChannel(self, self.finder.rows)
        self.merging = Merging(self.finder.forwards, self.layers, self.noisy)
        self._handles: tuple[RemovableHandle, ...] = ()

    @property
    def root(self) -> nn.Module:
        """Return the adapted model. As a plain attribute, it would be a submodule of the holder."""
        return self.finder.root

    def forward(self, x: object) -> object:
        """Return `x`, because a root such as `nn.Sequential` also calls the holder as a child."""
        return x

    def add(self, name: str, config: LoraConfig, cores: CoreSet, layers: list[LoraLayer]) -> None:
        """Add or replace an adapter with its configuration, cores and adapted layers."""
        self.cores[name] = cores
        self.configs[name] = config
        self.layers[name] = layers
        if layers:
            vars(layers[0]).setdefault(_CORES_OF_LAYER, {})[name] = cores
            if _CORES_OF_LAYER not in layers[0].adapter_layer_names:
                layers[0].adapter_layer_names = (*layers[0].adapter_layer_names, _CORES_OF_LAYER)

    def drop_deleted(self) -> None:
        """Remove adapters that left `peft_config`, even if a new adapter has the same name."""
        present = getattr(self.root, "peft_config", {})
        for name, config in list(self.configs.items()):
            if present.get(name) is not config:
                self.remove(name)

    def remove(self, name: str) -> None:
        """Remove an adapter; a merged update remains in the base weights."""
        self.schedules.pop(name, None)
        del self.cores[name], self.configs[name], self.layers[name]

    def reconfigure(self, name: str, config: LoraConfig) -> None:
        """Replace the configuration of an existing adapter."""
        peft_config: Any = self.root.peft_config
        peft_config[name] = self.configs[name] = config

    def active_names(self) -> list[str]:
        """Return the adapters with at least one layer that would read C now."""
        self.drop_deleted()
        return [
            name
            for name, layers in self.layers.items()
            if any(
                name in layer.active_adapters and not (layer.disable_adapters or layer.merged)
                for layer in layers
            )
        ]

    def follow_factors(self) -> None:
        """Make each core trainable if the A of its adapter is trainable, and freeze it if not."""
        for name, layers in self.layers.items():
            A = (f"lora_A.{name}.", f"lora_embedding_A.{name}.")
            first_layers = cast("list[nn.Module]", layers[:1])
            parameters = [pair for layer in first_layers for pair in layer.named_parameters()]
            is_trained = any(p.requires_grad for key, p in parameters if f"{key}.".startswith(A))
            self.cores[name].requires_grad_(is_trained)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """List the modules as `nn.Module.named_modules` does, without cores of deleted adapters."""
        present = getattr(self.root, "peft_config", {})
        deleted = [name for name in self.configs if present.get(name) is not self.configs[name]]
        hidden = tuple(f"{prefix}{'.' if prefix else ''}cores.{name}." for name in deleted)
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            if not f"{name}.".startswith(hidden):
                yield name, module

    def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        """Return the state dict of `nn.Module`, without deleted adapters."""
        self.drop_deleted()
        return super().state_dict(*args, **kwargs)

    def depends_on_noise(self, name: str) -> bool:
        """Return True if the adapter has cores, and one of them or the strength depends on λ."""
        return name in self.cores and (
            name in self.schedules or any(core.needs_noise for core in self.cores_of(name).values())
        )

    def noisy(self, names: Iterable[str]) -> list[str]:
        """Return the adapters in `names` that depend on λ."""
        return list(filter(self.depends_on_noise, names))

    @property
    def needs_noise(self) -> bool:
        """Return whether a layer would read a C that depends on λ."""
        return bool(self.noisy(self.active_names()))

    def attach(self) -> None:
        """Become a child of the root, and compute C(λ) before its forwards. Repeating is safe."""
        if getattr(self.root, HOLDER_NAME, None) is self:
            return
        setattr(self.root, HOLDER_NAME, self)
        self._handles = self.finder.forwards.hook(_before_forward, _after_forward)

    def detach(self) -> None:
        """Undo `attach`."""
        for handle in self._handles:
            handle.remove()
        self.finder.forwards.unhook()
        pass_no_cores(self.root, self.channel)
        self.root._modules.pop(HOLDER_NAME, None)

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any], is_clean: bool) -> None:
        """Push D(λ) of the adapters that the layers will read in this forward of the root.

        Args:
            is_clean: True for the encoder of a DiffusionGemma, which runs at λ = 0.
        """
        self.channel.local.pushed = None
        if not getattr(self.root, "peft_config", None):
            self.detach()  # the adapters have been unloaded
            return
        names, entry = self.active_names(), self.context()
        self._warn_of_use(names, entry, args, kwargs)
        if not names:
            return
        if "_diffusers_hook" in vars(self.root):
            onload_groups(self.root)
        if torch.is_grad_enabled():
            pass_cores(self.root, self.channel, self.finder.forwards.check_checkpointing)
        noisy = self.noisy(names)
        level = parts = None
        if noisy and is_clean:
            level = torch.zeros(1)
        elif noisy:
            level, parts = self.finder.level_of_forward(noisy, entry, args, kwargs)
        deviations = self.deviations_of(names, level)
        device = next((x.device for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if device is not None and device.type != "cpu":  # once for all layers
            deviations = {
                key: D.to(device) if D.device.type == "cpu" else D for key, D in deviations.items()
            }
        innermost = None if torch.compiler.is_compiling() else present.get()
        self.channel.local.pushed = Pushed(innermost, entry, deviations, parts)

    def _warn_of_use(
        self, names: list[str], entry: Entry | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Warn if a forward samples, or has another λ, than its active or merged adapters need."""
        first_layers = [layer for layers in self.layers.values() for layer in layers[:1]]
        # PEFT unmerges disabled layers before they run
        is_merged = any(layer.merged and not layer.disable_adapters for layer in first_layers)
        merged = self.merging.merged_at() if is_merged else None
        sampled = names if merged is None else [*names, *self.merging.merged_names()]
        if self.finder.usage.pipelines:
            self.finder.usage.warn_of_sampling(sampled)
        if merged is not None and entry is None:
            self.merging.warn_of_source(merged, self.finder, args, kwargs)

    def context(self) -> Entry | None:
        """Return the innermost open `noise_level(…)` of this model, or None if there is none."""
        entry = present.get()
        while entry is not None and (entry.level is None or self not in entry.holders):
            entry = entry.parent
        return entry

    def cores_of(self, name: str) -> CoreSet:
        """Return the cores of an adapter, by group."""
        return cast(CoreSet, self.cores[name])

    def deviations_of(self, names: Iterable[str], level: Tensor | None) -> dict[Key, Tensor]:
        """Return D (b or 1, r, r) by key for these adapters, except if layers treat C as I."""
        return {
            (name, group): self.deviation((name, group), level)
            for name in names
            for group, core in self.cores_of(name).items()
            if name in self.schedules or not isinstance(core, IdentityCore)
        }

    def deviation(self, key: Key, level: Tensor | None) -> Tensor:
        """Return D (b or 1, r, r), float32, for the layers with this key.

        The result includes the adapter's strength.
        """
        name, group = key
        D = cast(Core, self.cores_of(name)[group]).at(level)
        schedule = self.schedules.get(name)
        if schedule is None:
            return D
        assert level is not None
        if D.device.type == "cpu":
            D = D.to(level.device)  # an identity core has no weights
        strength = schedule.at(level.to(D.device))[:, None, None]
        identity = torch.eye(*D.shape[-2:], dtype=D.dtype, device=D.device)
        return strength * D + (strength - 1) * identity

    @torch.compiler.disable(recursive=True)
    def core_of_part(self, key: Key) -> tuple[Tensor, Parts | None]:
        """Return D, and the parts for its rows, for a layer with a key that isn't in the channel.

        If a forward of the root is running, another model's context has been entered since that
        forward began, and the forward's D is returned. Otherwise a part of the model was called
        directly, and D is computed at the λ of the context around that call.

        Raises:
            RuntimeError: no forward of the root is running, and no context sets λ; or rows cannot
                be assigned to samples.
        """
        entry, pushed = self.context(), self.channel.pushed()
        if pushed is not None and pushed.entry is entry and key in pushed.deviations:
            return pushed.deviations[key], pushed.parts
        is_outdated = entry is None or entry.backward != backward_pass()
        if is_outdated and self.depends_on_noise(key[0]):
            raise RuntimeError(
                f"No C(λ) has reached a layer for adapter '{key[0]}': the forward of the whole adapted model makes C. "
                "Call that forward, or call a part of it inside `with noise_level(model, value):`. For checkpointing, "
                "use the model's own `gradient_checkpointing_enable()`."
            )
        level = None if entry is None else entry.level
        if level is not None:
            level = self.channel.rows.level_of_part(level)
        with in_memory(self.root):
            return self.deviation(key, level), None

    @torch.no_grad()
    def core_to_merge(self, key: Key, layer: AdaptedLayer) -> tuple[Tensor, Tensor | None]:
        """Return D (1, r, r) for a layer that is being merged, and its λ (1,).

        λ is None if D does not depend on it.
        """
        level = self.merging.level_of_layer(key[0], layer, self.context())
        return self.deviation(key, level), level

    def check_merged(self, merged: Tensor) -> None:
        """Raise ValueError if the λ of `noise_level(…)` is not `merged`, the λ of merged layers.

        If the adapters were merged by `fuse_lora`, other adapters may run at another λ.
        """
        if not (self.merging.is_fused and self.needs_noise):
            self.merging.check_context(merged, self.context())


def holder_of(root: nn.Module) -> CoreHolder | None:
    """Return the holder of the adapted model `root`, or None if it has none."""
    holder = root._modules.get(HOLDER_NAME)
    return holder if isinstance(holder, CoreHolder) else None


def drop_idle_holder(root: nn.Module) -> None:
    """Remove the holder of `root`, its hooks and its source of λ, if no adapter is left."""
    holder = holder_of(root)
    if holder is not None:
        holder.drop_deleted()
        if not holder.cores:
            holder.detach()


@torch.compiler.disable(recursive=True)
def _before_forward(
    root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], is_clean: bool = False
) -> None:
    holder = holder_of(root)
    if holder is not None:
        holder.begin(args, kwargs, is_clean)


@torch.compiler.disable(recursive=True)
def _after_forward(root: nn.Module, *_: object) -> None:
    holder = holder_of(root)
    if holder is not None:
        holder.channel.local.pushed = None
