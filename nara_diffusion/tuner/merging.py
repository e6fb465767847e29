"""Merging an update that depends on λ: at one λ. Until it is unmerged, the model refuses to run at another λ."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from nara_diffusion.noise.context import noise_level as at_noise_level
from nara_diffusion.runtime.offloading import check_kept_nowhere
from nara_diffusion.tuner.holder.core_holder import CoreHolder, holder_of


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
            ValueError: an adapter depends on λ, and λ is not known or differs between samples; or group offloading
                would replace the merged weights at the next forward.
        """
        merge_at_one_level(self, super().merge_adapter, adapter_names, safe_merge, noise_level)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        noise_level: float | None = None,
    ) -> nn.Module:
        """The base model with the update of one λ in its weights; see `merge_adapter` for arguments and errors."""
        return merge_and_unload_at_one_level(
            self, super().merge_and_unload, progressbar, safe_merge, adapter_names, noise_level
        )


def merge_at_one_level(
    tuner: Any,
    merge: Callable[..., None],
    adapter_names: list[str] | None = None,
    safe_merge: bool = False,
    noise_level: float | None = None,
) -> None:
    """`MergesAtOneLevel.merge_adapter` for any LoRA tuner; `merge` is PEFT's method."""
    holder = holder_of(tuner.model)
    if holder is None:  # no adapter is left: PEFT merges nothing and raises nothing
        merge(adapter_names, safe_merge)
        return
    names = tuner.active_adapters if adapter_names is None else adapter_names
    level = nullcontext() if noise_level is None else at_noise_level(tuner.model, noise_level)
    with level, _all_or_nothing(tuner.model, holder):
        holder.signals_to_merge([name for name in names if name in holder.cores])
        check_kept_nowhere(tuner.model, LoraLayer)
        merge(adapter_names, safe_merge)


def merge_and_unload_at_one_level(
    tuner: Any,
    merge_and_unload: Callable[..., nn.Module],
    progressbar: bool = False,
    safe_merge: bool = False,
    adapter_names: list[str] | None = None,
    noise_level: float | None = None,
) -> nn.Module:
    """`MergesAtOneLevel.merge_and_unload`, with PEFT's own method for adapters that read no C."""
    names = tuner.active_adapters if adapter_names is None else adapter_names
    if not any(_reads_core(tuner, name) for name in names):
        return merge_and_unload(progressbar, safe_merge, adapter_names)
    tuner.merge_adapter(adapter_names, safe_merge, noise_level=noise_level)
    with warnings.catch_warnings():  # the layers are merged; PEFT does more than that when it merges and unloads
        warnings.filterwarnings("ignore", message="All adapters are already merged")
        return tuner._unload_and_optionally_merge(
            progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )


def _reads_core(tuner: Any, adapter_name: str) -> bool:
    holder = holder_of(tuner.model)
    has_core = getattr(tuner.peft_config.get(adapter_name), "core_type", "identity") != "identity"
    return has_core or (holder is not None and holder.depends_on_noise(adapter_name))


@contextmanager
def _all_or_nothing(model: nn.Module, holder: CoreHolder) -> Iterator[None]:
    """If merging fails in one layer, unmerge the layers before it."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before, signals = [list(layer.merged_adapters) for layer in layers], holder.merged_level.signals
    try:
        yield
    except Exception:
        for layer, names in zip(layers, before, strict=True):
            if layer.merged_adapters != names:
                layer.unmerge()
                if names:
                    layer.merge(adapter_names=names)
        holder.merged_level.signals = signals
        raise


def unmerge_all(root: nn.Module) -> None:
    """Take every merged adapter out of the base weights of the layers below `root`."""
    for module in root.modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            module.unmerge()
