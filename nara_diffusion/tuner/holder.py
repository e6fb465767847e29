"""Hold the cores of an adapted model at its root, and compute D(λ) for each forward.

    D(λ) = C(λ) − I                             (b or 1, r, r), float32, for λ (b,)
    D' = σ(λ) C(λ) − I = σ D + (σ − 1) I        for an adapter with a strength σ

The holder owns the cores and their strengths, and passes D to the layers, also when a gradient
checkpoint recomputes a block. PEFT or Diffusers may change the adapters at any time, and only
PEFT's layers know which adapters are active, merged, disabled or deleted, so the holder asks them.

If an adapter is no longer in `peft_config`, the next forward, save or addition removes its cores.
If it was the last adapter, the holder and its hooks are removed too. A core is trainable while the
A of its adapter is trainable. Every call that lists parameters updates this.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nara_diffusion.cores.core import IdentityCore
from nara_diffusion.cores.registry import HOLDER_NAME, CoreSet
from nara_diffusion.layers.adapted_layer import AdaptedLayer
from nara_diffusion.layers.channel import CoreChannel, Key
from nara_diffusion.layers.offloading import in_memory, onload_groups
from nara_diffusion.noise.context import backward_pass, entry_for, outer_modules
from nara_diffusion.noise.parts import Parts
from nara_diffusion.noise.rows import ModelRows
from nara_diffusion.noise.strength_schedule import StrengthSchedule
from nara_diffusion.noise.timesteps import Denoiser

from .checkpointing import CheckpointWithCore
from .finder import LevelFinder
from .merging import Merging
from .twin_hooks import hook_twins, unhook_twins
from .twins import check_checkpointing, twins_of

_CHECKPOINTS = ("_gradient_checkpointing_func", "checkpoint_fn")
"""The attributes that keep a checkpoint function: of Transformers and Diffusers, of PyTorch's wrapper."""


class CoreHolder(nn.Module):
    """Own the cores of one adapted model, `cores[adapter][group]`.

    Each NaRA has an entry. A plain LoRA has an entry only while its strength depends on λ.

    Args:
        root: the adapted model.
        denoiser: the table's entry for the root's class.

    Attributes:
        configs: the configuration of each adapter, by name, at the time its cores were made.
        layers: the PEFT layers of each adapter, by name.
        schedules: the strength over λ of each adapter that has one, by name.
        deviations: the object that computes D(λ) = C(λ) − I.
        channel: the channel that passes D(λ) to the layers.
        finder: the object that finds λ for a forward.
        merging: the object that finds and compares the λ of merged layers.
    """

    is_core_holder = True

    def __init__(self, root: nn.Module, denoiser: Denoiser | None = None) -> None:
        super().__init__()
        self.cores = nn.ModuleDict()
        self.configs: dict[str, LoraConfig] = {}
        self.layers: dict[str, list[LoraLayer]] = {}
        self.schedules: dict[str, StrengthSchedule] = {}
        self.deviations = Deviations(self.cores, self.schedules)
        rows = ModelRows.of(denoiser)
        self.channel = CoreChannel(self, rows)
        self.finder = LevelFinder(root, self.configs, rows, denoiser)
        self.merging = Merging(root, self.layers, self.deviations.noisy)
        self._handles: tuple[RemovableHandle, ...] = ()

    @property
    def root(self) -> nn.Module:
        """Return the adapted model. As a plain attribute, it would be a submodule of the holder."""
        return self.finder.root

    def forward(self, x: Any) -> Any:
        """Return `x`, because a root such as `nn.Sequential` also calls the holder as a child."""
        return x

    # ------------------------------------------------------------------ adapters

    def add(self, name: str, config: LoraConfig, cores: CoreSet, layers: list[LoraLayer]) -> None:
        """Add or replace an adapter with its configuration, cores and adapted layers."""
        self.cores[name] = cores
        self.configs[name] = config
        self.layers[name] = layers

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
        names = []
        for name, layers in self.layers.items():
            if any(_reads_core(layer, name) for layer in layers):
                names.append(name)
        return names

    def follow_factors(self) -> None:
        """Make each core trainable if the A of its adapter is trainable, and freeze it if not."""
        for name, layers in self.layers.items():
            trainable = bool(layers) and _is_trainable(layers[0], name)
            for parameter in self.cores[name].parameters():
                if parameter.requires_grad != trainable:
                    parameter.requires_grad = trainable

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Update the adapters and what is trainable, then do as `nn.Module.named_modules` does.

        Any call that lists parameters, of the holder or of the root, calls this method.
        """
        self.drop_deleted()
        self.follow_factors()
        return super().named_modules(memo, prefix, remove_duplicate)

    def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        """Return the state dict of `nn.Module`, without deleted adapters."""
        self.drop_deleted()
        return super().state_dict(*args, **kwargs)

    def has_strength(self, name: str) -> bool:
        """Return True if the strength of the adapter depends on λ."""
        return name in self.schedules

    @property
    def needs_noise(self) -> bool:
        """Return whether a layer would read a C that depends on λ."""
        return bool(self.deviations.noisy(self.active_names()))

    # ------------------------------------------------------------------ hooks of the root

    def attach(self) -> None:
        """Become a child of the root, and compute C(λ) before its forwards. Repeating is safe."""
        if getattr(self.root, HOLDER_NAME, None) is self:
            return
        setattr(self.root, HOLDER_NAME, self)
        twins = twins_of(self.root)
        if twins is not None:
            source = self.finder.canvas_source
            self._handles = hook_twins(self.root, twins, source, self.begin, self.end)
            return
        self._handles = (
            self.root.register_forward_pre_hook(_before_forward, with_kwargs=True),
            self.root.register_forward_hook(_after_forward, always_call=True),
        )

    def detach(self) -> None:
        """Undo `attach`."""
        for handle in self._handles:
            handle.remove()
        self._handles = ()
        twins = twins_of(self.root)
        if twins is not None:
            unhook_twins(self.root, twins, self.finder.canvas_source)
        _checkpoint_without_core(self.root, self.channel)
        self.root._modules.pop(HOLDER_NAME, None)

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any], is_clean: bool = False) -> None:
        """Push D(λ) of the adapters that the layers will read in this forward of the root.

        Args:
            is_clean: True for the encoder of twins (`twins`), which runs at λ = 0.
        """
        self.channel.local.pushed = None
        names = self.active_names()
        if not getattr(self.root, "peft_config", None):
            self.detach()  # the adapters have been unloaded
            return
        entry = entry_for(self)
        merged = self.merged_in_forward()
        self.finder.usage.warn_of_sampling(names)
        if merged is not None:
            self.finder.usage.warn_of_sampling(self.merging.merged_names())
            if entry is None:
                self.merging.warn_of_source(merged, self.finder, args, kwargs)
        self.follow_factors()
        if not names:
            return
        if "_diffusers_hook" in vars(self.root):
            onload_groups(self.root)
        if torch.is_grad_enabled():
            _checkpoint_with_core(self.root, self.channel)
        noisy = self.deviations.noisy(names)
        level = parts = None
        if noisy and is_clean:
            level = torch.zeros(1)
        elif noisy:
            level, parts = self.finder.level_of_forward(noisy, entry, args, kwargs)
        deviations = _beside_inputs(self.deviations.of(names, level), args, kwargs)
        self.channel.push(entry, deviations, parts)

    def end(self) -> None:
        """Take D(λ) away from the layers after a forward."""
        self.channel.local.pushed = None

    # ------------------------------------------------------------------ D outside a forward

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
        name = key[0]
        entry = entry_for(self)
        pushed = self.channel.pushed()
        if pushed is not None and pushed.entry is entry and key in pushed.deviations:
            return pushed.deviations[key], pushed.parts
        level = None if entry is None else entry.level
        is_outdated = entry is None or entry.backward != backward_pass()
        if self.deviations.depends_on_noise(name) and (level is None or is_outdated):
            raise RuntimeError(
                f"No C(λ) has reached a layer for adapter '{name}': the forward of the whole adapted model makes C. "
                "Call that forward, or call a part of it inside `with noise_level(model, value):`. For checkpointing, "
                "use the model's own `gradient_checkpointing_enable()`."
            )
        if level is not None:
            level = self.channel.rows.level_of_part(level)
        with in_memory(self.root):
            return self.deviations.at(key, level), None

    # ------------------------------------------------------------------ merging

    def merged_in_forward(self) -> Tensor | None:
        """Return λ (1,) of merged layers if they stay merged in this forward, otherwise None.

        If the adapters are disabled, the layers do not stay merged, because PEFT unmerges them.
        """
        for layers in self.layers.values():
            if layers and layers[0].merged and not layers[0].disable_adapters:
                return self.merging.merged_at()
        return None

    @torch.no_grad()
    def core_to_merge(self, key: Key, layer: AdaptedLayer) -> tuple[Tensor, Tensor | None]:
        """Return D (1, r, r) for a layer that is being merged, and its λ (1,).

        λ is None if D does not depend on it.
        """
        level = self.merging.level_of_layer(key[0], layer, entry_for(self))
        return self.deviations.at(key, level), level

    def check_merged(self, merged: Tensor) -> None:
        """Raise ValueError if the λ of `noise_level(…)` is not `merged`, the λ of merged layers.

        If the adapters were merged by `fuse_lora`, other adapters may run at another λ.
        """
        if not (self.merging.is_fused and self.needs_noise):
            self.merging.check_context(merged, entry_for(self))


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
    root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    holder = holder_of(root)
    if holder is None:
        return None
    holder.begin(args, kwargs)
    changed = holder.finder.block_masked(args, kwargs)
    return None if changed is None else (args, changed)


@torch.compiler.disable(recursive=True)
def _after_forward(root: nn.Module, args: tuple[Any, ...], output: object) -> None:
    holder = holder_of(root)
    if holder is not None:
        holder.end()


def _reads_core(layer: LoraLayer, adapter_name: str) -> bool:
    """Return True if a forward of the layer would read the adapter's C now."""
    is_off = layer.disable_adapters or layer.merged
    return not is_off and adapter_name in layer.active_adapters


def _is_trainable(layer: LoraLayer, adapter_name: str) -> bool:
    """Return True if the adapter's A is trainable in this layer."""
    if adapter_name in layer.lora_A:
        parameters = layer.lora_A[adapter_name].parameters()
        return any(parameter.requires_grad for parameter in parameters)
    embeddings = layer.lora_embedding_A
    return adapter_name in embeddings and embeddings[adapter_name].requires_grad


# ---------------------------------------------------------------------- D of the adapters


@dataclass(eq=False)
class Deviations:
    """Compute D(λ) for the adapters of one model.

    The core holder owns both dicts and changes them in place.

    Args:
        cores: the cores of each adapter, by name.
        schedules: the strength over λ of each adapter that has one, by name.
    """

    cores: nn.ModuleDict
    schedules: dict[str, StrengthSchedule]

    def cores_of(self, name: str) -> CoreSet:
        """Return the cores of an adapter, by group."""
        cores = self.cores[name]
        assert isinstance(cores, CoreSet)
        return cores

    def depends_on_noise(self, name: str) -> bool:
        """Return True if the adapter has cores, and one of them or the strength depends on λ."""
        if name not in self.cores:
            return False
        return name in self.schedules or self.cores_of(name).needs_noise

    def noisy(self, names: Iterable[str]) -> list[str]:
        """Return the adapters in `names` that depend on λ."""
        return list(filter(self.depends_on_noise, names))

    def of(self, names: Iterable[str], level: Tensor | None) -> dict[Key, Tensor]:
        """Return D (b or 1, r, r) by key for these adapters, except if layers treat C as I."""
        found = {}
        for name in names:
            for group, core in self.cores_of(name).items():
                if name in self.schedules or not isinstance(core, IdentityCore):
                    found[name, group] = self.at((name, group), level)
        return found

    def at(self, key: Key, level: Tensor | None) -> Tensor:
        """Return D (b or 1, r, r), float32, for the layers with this key.

        The result includes the adapter's strength.
        """
        name, group = key
        D = self.cores_of(name).deviation(group, level)
        schedule = self.schedules.get(name)
        if schedule is None:
            return D
        assert level is not None
        if D.device.type == "cpu":
            D = D.to(level.device)  # an identity core has no weights
        strength = schedule.at(level.to(D.device))[:, None, None]
        identity = torch.eye(D.shape[-1], dtype=D.dtype, device=D.device)
        return strength * D + (strength - 1) * identity

    def matrix(self, key: Key, level: Tensor | None) -> Tensor:
        """Return C (b or 1, r, r) times the strength, float32, for export."""
        D = self.at(key, level)
        return torch.eye(D.shape[-1], dtype=D.dtype, device=D.device) + D


def _beside_inputs(
    deviations: dict[Key, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[Key, Tensor]:
    """Move D from the CPU to the device of the forward's first tensor, once for all layers."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            break
    else:
        return deviations
    if value.device.type == "cpu":
        return deviations
    moved = {}
    for key, D in deviations.items():
        moved[key] = D.to(value.device) if D.device.type == "cpu" else D
    return moved


# ---------------------------------------------------------------------- checkpointed blocks


def _checkpoint_with_core(root: nn.Module, channel: CoreChannel) -> None:
    """Wrap the checkpoint function of every checkpointed block in `root`. Repeating is safe."""
    for module in outer_modules(root):
        for name in _CHECKPOINTS:
            checkpoint = module.__dict__.get(name)
            wrapped = isinstance(checkpoint, CheckpointWithCore) and checkpoint.passes(channel)
            if callable(checkpoint) and not wrapped:
                check_checkpointing(root, checkpoint)
                setattr(module, name, CheckpointWithCore(checkpoint, channel))


def _checkpoint_without_core(root: nn.Module, channel: CoreChannel) -> None:
    """Undo `_checkpoint_with_core`.

    A wrapper inside another model's wrapper stays in place but no longer passes on cores.
    """
    for module in outer_modules(root):
        for name in _CHECKPOINTS:
            checkpoint = module.__dict__.get(name)
            if isinstance(checkpoint, CheckpointWithCore) and checkpoint.channel is channel:
                setattr(module, name, checkpoint.checkpoint)
