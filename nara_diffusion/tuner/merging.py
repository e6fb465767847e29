"""Merging an update that depends on λ: at one λ. Until it is unmerged, the model refuses to run at another λ."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from nara_diffusion.noise.level import noise_level as at_noise_level

from .holder import holder_of


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
        holder = holder_of(self.model)
        if holder is None:  # no adapter is left: PEFT merges nothing and raises nothing
            super().merge_adapter(adapter_names, safe_merge)
            return
        names = self.active_adapters if adapter_names is None else adapter_names
        level = nullcontext() if noise_level is None else at_noise_level(self.model, noise_level)
        with level, _unmerged_on_error(self.model):
            holder.signals_to_merge([name for name in names if name in holder.cores])
            super().merge_adapter(adapter_names, safe_merge)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        noise_level: float | None = None,
    ) -> nn.Module:
        """The base model with the update of one λ in its weights; see `merge_adapter` for arguments and errors."""
        names = self.active_adapters if adapter_names is None else adapter_names
        if not any(self._reads_core(name) for name in names):
            return super().merge_and_unload(progressbar, safe_merge, adapter_names)
        self.merge_adapter(adapter_names, safe_merge, noise_level=noise_level)
        with warnings.catch_warnings():  # the layers are merged; PEFT does more than that when it merges and unloads
            warnings.filterwarnings("ignore", message="All adapters are already merged")
            return self._unload_and_optionally_merge(
                progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
            )

    def _reads_core(self, adapter_name: str) -> bool:
        holder = holder_of(self.model)
        has_core = getattr(self.peft_config.get(adapter_name), "core_type", "identity") != "identity"
        return has_core or (holder is not None and holder.depends_on_noise(adapter_name))


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
