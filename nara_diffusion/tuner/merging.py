"""Merge an update at one λ, and raise an error for any other λ until the update is unmerged.

Only the layers know what is merged into them. The LoRA variant of a merged layer stores the λ of
the merge as `merged_at`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from nara_diffusion.layers.adapted_layer import AdaptedLayer
from nara_diffusion.layers.offloading import is_offloaded
from nara_diffusion.noise.context import Entry, backward_pass
from nara_diffusion.noise.level import Level, as_level

from .adapted_forwards import RootForwards
from .finder import LevelFinder, unknown_level

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Merging:
    """Find the λ for merging or exporting one model's adapters, and compare it with a forward's λ.

    Args:
        forwards: the forwards of the adapted model, which may refuse a merge.
        layers: the layers of each adapter, by name. The core holder owns this dict and changes it
            in place.
        noisy: a function that returns which of the given adapters depend on λ.
    """

    forwards: RootForwards
    layers: dict[str, list[LoraLayer]]
    noisy: Callable[[Iterable[str]], list[str]]
    _warned_of: Tensor | None = field(default=None, init=False, repr=False)

    @property
    def root(self) -> nn.Module:
        return self.forwards.root

    def merged_at(self) -> Tensor | None:
        """Return λ (1,) of merged layers, or None if no layer was merged with a λ-dependent C."""
        variants = [
            layers[0].lora_variant.get(name) for name, layers in self.layers.items() if layers
        ]
        levels = [getattr(variant, "merged_at", None) for variant in variants]
        return next((level for level in levels if level is not None), None)

    def merged_names(self) -> list[str]:
        """Return the adapters that are merged into the base weights."""
        return [
            name
            for name, layers in self.layers.items()
            if layers and name in layers[0].merged_adapters
        ]

    @property
    def is_fused(self) -> bool:
        """Return True if Diffusers' `fuse_lora` merged the adapters (it already warned)."""
        return "_safe_fusing" in vars(self.root)

    @property
    def binds_level(self) -> bool:
        """Return whether a sampler must run at the λ of merged layers."""
        return self.merged_at() is not None and not self.is_fused

    def one_level(
        self, names: list[str], level: Tensor | None, entry: Entry | None, remedy: str
    ) -> Tensor:
        """Return the λ (1,) for merging or exporting adapters.

        Args:
            names: the adapters. All of them depend on λ.
            level: λ. If None, it is the λ of `entry` or, if `entry` is None, of merged layers.
            entry: the current context `noise_level(…)`, or None.
            remedy: the end of the error message for an unknown λ.

        Raises:
            ValueError: λ is unknown, or differs between samples.
        """
        if level is None:
            level = self.merged_at() if entry is None else entry.level
        if level is None:
            raise unknown_level(self.root, names, remedy)
        level = level.detach().flatten()
        if level.unique().numel() > 1:
            raise ValueError(
                f"noise_level is {level.tolist()}: pass a single value to merge or export."
            )
        return level[:1]

    def level_to_merge(self, names: Iterable[str], entry: Entry | None) -> Tensor | None:
        """Return the λ (1,) for merging these adapters, or None if none of them depends on λ.

        Raises:
            ValueError: λ is unknown or differs between samples; other adapters are merged at
                another λ; or weights are offloaded.
        """
        self.forwards.check_merge()
        if is_offloaded(self.root):
            raise ValueError(
                f"Adapters cannot be merged while weights of {type(self.root).__name__} are offloaded, since they "
                "would come back without them: merge first, then offload."
            )
        noisy = self.noisy(names)
        if not noisy:
            return None
        configs: Any = self.root.peft_config
        for name in noisy:
            if getattr(configs[name], "core_type", None) == "film":
                raise ValueError(
                    f"Adapter '{name}' can't be merged: its core 'film' adds β(λ), which isn't part of a weight. Leave "
                    "it unmerged."
                )
        remedy = (
            "a λ-dependent update can only be merged at one λ. Pass noise_level=…, or merge inside "
            "`with noise_level(model, value):`."
        )
        level = self.one_level(noisy, None, entry, remedy)
        merged = self.merged_at()
        if merged is not None and level.item() != merged.item():
            raise ValueError(
                f"Adapters are merged at noise_level {merged.item():.6g}, not {level.item():.6g}: call "
                "unmerge_adapter() first."
            )
        return level

    def level_of_layer(self, name: str, layer: AdaptedLayer, entry: Entry | None) -> Tensor | None:
        """Return the λ (1,) for merging one layer, or None if its C does not depend on λ."""
        merged = self.merged_at()
        if merged is not None and name in self.merged_names():  # other layers are merged
            return merged
        try:
            level = self.level_to_merge([name], entry)
        except ValueError:
            if self.is_fused:  # Diffusers scales the layer by this before merging
                scale: Any = self.root.lora_scale
                layer.unscale_layer(scale)
            raise
        if level is not None and self.is_fused:
            logger.warning(
                "%s: '%s' is fused at noise_level %.6g: until unfuse_lora() every step runs at the C of that λ, "
                "not of its own.",
                type(self.root).__name__,
                name,
                level.item(),
            )
        return level

    def level_to_export(
        self, name: str, noise_level: Level | None, entry: Entry | None
    ) -> Tensor | None:
        """Return the λ (1,) for exporting an adapter, or None if the adapter does not depend on λ.

        Args:
            name: the name of the adapter.
            noise_level: λ. If None, it is the λ of `entry` or, if `entry` is None, of merged layers.
            entry: the current context `noise_level(…)`, or None.
        """
        noisy = self.noisy([name])
        if not noisy:
            return None
        self.forwards.check_merge()
        remedy = "a plain LoRA is exact at only one λ. Pass noise_level=…, or export inside `with noise_level(…):`."
        level = None if noise_level is None else as_level(noise_level)
        return self.one_level(noisy, level, entry, remedy)

    def check_context(self, merged: Tensor, entry: Entry | None) -> None:
        """Raise ValueError if the λ of the context `entry` is not `merged`, the λ of the merge."""
        level = None if entry is None else entry.level
        if level is None or backward_pass() != -1:
            return
        if not bool((level == merged.to(level.device)).all()):
            raise ValueError(
                f"The adapter is merged at noise_level {merged.item():.6g}, but this forward asks for "
                f"{level.tolist()}: call unmerge_adapter() first."
            )

    def warn_of_source(
        self,
        merged: Tensor,
        finder: LevelFinder,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Warn once per merge if the λ of the source is not `merged`, the λ of the merge."""
        if self._warned_of is merged or self.is_fused:
            return
        try:
            level = finder.level_of_source(args, kwargs)
        except ValueError:  # no adapter needs a source that cannot compute λ here
            return
        if level is None or bool((level == merged.to(level.device)).all()):
            return
        self._warned_of = merged
        levels = ", ".join(f"{value:.6g}" for value in level.flatten().tolist())
        warnings.warn(
            f"The adapter is merged at noise_level {merged.item():.6g}, and every forward runs at that, but "
            f"the source gives [{levels}]: call unmerge_adapter() to follow the source.",
            UserWarning,
            stacklevel=2,
        )


@contextmanager
def unmerged_on_error(model: nn.Module) -> Iterator[None]:
    """After an error inside the context, unmerge the layers that were merged inside it."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    merged = [list(layer.merged_adapters) for layer in layers]
    try:
        yield
    except Exception:
        for layer, names in zip(layers, merged, strict=True):
            if layer.merged_adapters != names:
                layer.unmerge()
                if names:
                    layer.merge(adapter_names=names)
        raise
