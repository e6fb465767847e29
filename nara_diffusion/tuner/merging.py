"""Merging an update that depends on λ: at one λ. Until it is unmerged, the model refuses to run at another λ.

The layers alone know what is merged into them: a merged layer's LoRA variant keeps the λ of that as `merged_at`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from nara_diffusion.cores.registry import HOLDER_NAME
from nara_diffusion.layers.offloading import is_offloaded
from nara_diffusion.layers.variants import Key
from nara_diffusion.noise.level import Level, as_level, backward_pass, entry_for
from nara_diffusion.noise.level import noise_level as at_noise_level

logger = logging.getLogger(__name__)


class MergesCores:
    """What the holder of cores does for merging and export: C at one λ, and the refusal of another."""

    root: Any
    needs_noise: bool
    merged_at: Any
    merged_names: Any
    matrix: Any
    depends_on_noise: Any
    check_known: Any
    present_source: Any
    _warned_of: Tensor | None = None

    @property
    def is_fused(self) -> bool:
        """Whether it was Diffusers' `fuse_lora`, which has said that every step runs at one λ, that merged."""
        return "_safe_fusing" in vars(self.root)

    @property
    def binds_level(self) -> bool:
        """Whether a sampler that has another λ than that of merged layers must not run."""
        return self.merged_at() is not None and not self.is_fused

    def one_level(self, names: list[str], level: Tensor | None, purpose: str) -> Tensor | None:
        """λ (1,) at which these adapters are merged or exported; None if they need none.

        Args:
            level: None takes that of `noise_level(…)`, or of merged layers. purpose: the end of the error.

        Raises:
            ValueError: λ is not known, or differs between samples.
        """
        if not any(map(self.depends_on_noise, names)):
            return None
        entry = entry_for(self)
        if level is None:
            level = self.merged_at() if entry is None else entry.level
        self.check_known(names, level, purpose)
        assert level is not None
        if level.unique().numel() > 1:
            raise ValueError(
                f"noise_level is {level.tolist()}: pass a single value to merge or export."
            )
        return level[:1].detach()

    def level_to_export(self, name: str, noise_level: Level | None) -> Tensor | None:
        """λ (1,) at which the adapter is exported. None is that of `noise_level(…)`, or of merged layers."""
        purpose = "a plain LoRA is exact at one λ alone. Pass noise_level=…, or export inside `with noise_level(…):`."
        return self.one_level(
            [name], None if noise_level is None else as_level(noise_level), purpose
        )

    def level_to_merge(self, names: list[str]) -> Tensor | None:
        """λ (1,) at which these adapters are merged: not another than what is merged already, and no weights are
        offloaded."""
        if is_offloaded(self.root):
            raise ValueError(
                f"Adapters cannot be merged while weights of {type(self.root).__name__} are offloaded, since they "
                "would come back without them: merge first, then offload."
            )
        remedy = "Pass noise_level=…, or merge inside `with noise_level(model, value):`."
        purpose = f"a λ-dependent update can only be merged at one λ. {remedy}"
        level, merged = self.one_level(names, None, purpose), self.merged_at()
        if level is not None and merged is not None and level.item() != merged.item():
            raise ValueError(
                f"Adapters are merged at noise_level {merged.item():.6g}, not {level.item():.6g}: call "
                "unmerge_adapter() first."
            )
        return level

    @torch.no_grad()
    def core_to_merge(self, key: Key, layer: Any) -> tuple[Tensor, Tensor | None]:
        """C (1, r, r) for a `layer` that is being merged, and the only λ to run at until it is unmerged."""
        merged = self.merged_at()
        if key[0] in self.merged_names() and merged is not None:  # into layers before this one
            return self.matrix(key, merged), merged
        try:
            level = self.level_to_merge([key[0]])
        except ValueError:
            if self.is_fused:  # Diffusers has multiplied the layer by this before it merges
                layer.unscale_layer(self.root.lora_scale)
            raise
        if level is not None and self.is_fused:
            logger.warning(
                "%s: '%s' is fused at noise_level %.6g: until unfuse_lora() every step runs at the C of that λ, "
                "whatever its own is.",
                type(self.root).__name__,
                key[0],
                level.item(),
            )
        return self.matrix(key, level), level

    def check_merged(self, merged: Tensor) -> None:
        """Raises ValueError if `noise_level(…)` gives another λ than `merged`; beside what is fused it may."""
        entry = entry_for(self)
        given = None if entry is None else entry.level
        if given is None or backward_pass() != -1 or (self.is_fused and self.needs_noise):
            return
        if not bool((given == merged.to(given.device)).all()):
            raise ValueError(
                f"The adapter is merged at noise_level {merged.item():.6g}, but this forward asks for "
                f"{given.tolist()}: call unmerge_adapter() first."
            )

    def warn_of_merged(self, merged: Tensor, args: Any, kwargs: Any) -> None:
        """Say once a merge if the source of λ gives this forward another λ than that of merged layers."""
        if self._warned_of is merged or self.is_fused or entry_for(self) is not None:
            return
        try:
            source = self.present_source()
            found = merged if source is None else as_level(source(self.root, args, kwargs))
        except ValueError:  # a source that can't tell λ here is needed by none
            return
        if bool((found == merged.to(found.device)).all()):
            return
        self._warned_of = merged
        levels = ", ".join(f"{level:.6g}" for level in found.tolist())
        warnings.warn(
            f"The adapter is merged at noise_level {merged.item():.6g}, at which every forward runs, but "
            f"the source tells [{levels}]: call unmerge_adapter() to run at that.",
            UserWarning,
            stacklevel=2,
        )


class MergesAtOneLevel(LoraModel):
    """PEFT's merging at one λ. It merges all layers or none; without a λ it raises."""

    def merge_adapter(
        self,
        adapter_names: list[str] | None = None,
        safe_merge: bool = False,
        noise_level: float | None = None,
    ) -> None:
        """Merge the update of one λ into the base weights, until `unmerge_adapter`.

        Args:
            adapter_names, safe_merge: as in PEFT.
            noise_level: λ in [0, 1]. None takes that of the active `noise_level(…)` context.

        Raises:
            ValueError: an adapter depends on λ, and λ is not known or differs between samples; or weights are
                offloaded, which would come back without the adapter.
        """
        holder: Any = self.model._modules.get(HOLDER_NAME)
        if holder is None:  # no adapter is left: PEFT merges nothing and raises nothing
            super().merge_adapter(adapter_names, safe_merge)
            return
        names = self.active_adapters if adapter_names is None else adapter_names
        level = nullcontext() if noise_level is None else at_noise_level(self.model, noise_level)
        with level, _unmerged_on_error(self.model):
            holder.level_to_merge([name for name in names if name in holder.cores])
            super().merge_adapter(adapter_names, safe_merge)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        noise_level: float | None = None,
    ) -> nn.Module:
        """The base model with the update of one λ in its weights; see `merge_adapter` for arguments and errors."""
        self.merge_adapter(adapter_names, safe_merge, noise_level=noise_level)
        with (
            warnings.catch_warnings()
        ):  # the layers are merged; PEFT does more than that when it merges and unloads
            warnings.filterwarnings("ignore", message="All adapters are already merged")
            merged: Any = self._unload_and_optionally_merge(
                progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
            )
        return merged


@contextmanager
def _unmerged_on_error(model: nn.Module) -> Iterator[None]:
    """If merging fails in one layer, unmerge the layers before it."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [list(layer.merged_adapters) for layer in layers]
    try:
        yield
    except Exception:
        for layer, names in zip(layers, before, strict=True):
            if layer.merged_adapters != names:
                layer.unmerge()
                if names:
                    layer.merge(adapter_names=names)
        raise
