"""Merging an update that depends on λ: at one λ, which is then the only one that the model can run at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .holder import CoreHolder
from .noise import NoiseSignals, active_signals, as_signal, core_holders


class MergesAtOneLevel(LoraModel):
    """PEFT's merging with a λ: refused without one, all layers or none, and undone by `unmerge_adapter`."""

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
            ValueError: an adapter depends on λ and none is known, or it differs between samples.
        """
        with self._fixed_core(adapter_names, noise_level), self._all_or_nothing():
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
        if all(getattr(self.peft_config.get(name), "core_type", "identity") == "identity" for name in names):
            return super().merge_and_unload(progressbar, safe_merge, adapter_names)
        self.merge_adapter(adapter_names, safe_merge, noise_level)
        return self._unload_and_optionally_merge(merge=False, progressbar=progressbar)  # type: ignore[return-value]

    @contextmanager
    def _fixed_core(self, adapter_names: list[str] | None, level: float | None) -> Iterator[None]:
        """Inside, layers find the C of the λ at which to merge."""
        (holder,) = core_holders(self.model)
        names = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in names if name in holder.cores]
        signals = _merge_signals(holder, names, level)
        # finding DoRA's norm takes what is merged already out of the weight and puts it back
        names = [*names, *(name for name in holder.merged_adapters if name not in names)]
        with torch.no_grad(), holder.channel.using(holder(signals, names)):
            yield
        holder.merged_signals = signals

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """If merging fails in one layer, the layers before it are put back."""
        layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
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


def _single(signals: NoiseSignals) -> NoiseSignals:
    """The signals of a batch whose samples agree, as those of one sample."""
    for name, signal in zip(NoiseSignals._fields, signals, strict=True):
        if signal is not None and signal.unique().numel() > 1:
            raise ValueError(f"{name} is {signal.tolist()}: merging needs a single value.")
    level, density = signals
    return NoiseSignals(level[:1], None if density is None else density[:1])


def _merge_signals(holder: CoreHolder, names: list[str], level: float | None) -> NoiseSignals | None:
    """λ, one value, at which the named adapters are to be merged; what is merged already, where they need none.

    Raises:
        ValueError: λ is not known, differs between samples, or is not that of what is merged already.
    """
    signals = active_signals(holder.channel) if level is None else NoiseSignals(as_signal(level))
    holder.check_signals(
        signals,
        names,
        "a λ-dependent update can only be merged at one λ. Pass noise_level=…, or merge inside "
        "`with noise_level(model, value):`.",
    )
    if signals is None or not holder.depend_on_noise(names):
        return holder.merged_signals
    signals, merged = _single(signals), holder.merged_signals
    if merged is not None:
        now, then = signals.noise_level.item(), merged.noise_level.item()
        if now != then:
            raise ValueError(
                f"Adapters are merged at noise_level {then:.6g}, not {now:.6g}: call unmerge_adapter() first."
            )
    return signals
