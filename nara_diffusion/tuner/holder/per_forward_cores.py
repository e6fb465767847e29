"""The per-forward cores: C(λ) for one forward of the root, or for a part of the root that is called by itself.

They map (adapter, group of layers) to C (b or 1, r, r). A group whose C is I has no entry.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nara_diffusion.noise.ablations import as_read, grid_of, is_noise_changed
from nara_diffusion.noise.context import active_adapter_names, active_signals
from nara_diffusion.noise.signals import NoiseSignals, NoiseSource, as_signals
from nara_diffusion.runtime.channel import CoreChannel, PerForwardCores, is_current
from nara_diffusion.runtime.context_stack import innermost, is_traced
from nara_diffusion.runtime.guards import check_not_split
from nara_diffusion.runtime.modules import arguments_of
from nara_diffusion.runtime.offloading import beside_inputs, is_sharded
from nara_diffusion.tuner.strength.scheduled_cores import ScheduledCores

from .batch_signals import check_batch, check_one_level, of_adapter
from .core_set import CoreSet
from .noise_convention import denoiser_hint

AdapterCores = Mapping[str, CoreSet | ScheduledCores]
"""Adapter → its cores, of the adapters that take part in a forward."""

_DENSITY_REMEDY = "pass noise_level(model, value, mask_density=…), or set a source that tells it."


def depend_on_noise(cores: AdapterCores) -> bool:
    """Whether one of them needs λ."""
    return any(core.needs_noise for core in cores.values())


def check_signals(
    cores: AdapterCores, signals: NoiseSignals | None, remedy: str, density_remedy: str = _DENSITY_REMEDY
) -> NoiseSignals | None:
    """`signals`, if they are all that `cores` need.

    Raises:
        ValueError: λ or the mask density is not known, but needed.
    """
    names = ", ".join(map(repr, cores))
    if signals is None and depend_on_noise(cores):
        raise ValueError(f"λ is not known, but adapter(s) {names} depend on it: {remedy}")
    if any(core.needs_density for core in cores.values()) and (signals is None or signals.mask_density is None):
        raise ValueError(f"The mask density is not known, but adapter(s) {names} read it: {density_remedy}")
    return signals


def cores_of_forward(
    cores: AdapterCores, channel: CoreChannel, source: NoiseSource | None, root: nn.Module, args: Any, kwargs: Any
) -> PerForwardCores:
    """The cores of all groups, for one forward of `root`.

    Raises:
        ValueError: see `check_signals`; or λ has another number of values than the batch.
    """
    grid = grid_of(channel)
    if grid is None:
        made = _cores_at(cores, channel, _signals_of_forward(cores, channel, source, root, args, kwargs))
    else:
        check_signals(cores, grid, "", density_remedy="pass mask_density=… to mean_core().")
        found = {name: core_set.at(grid) for name, core_set in cores.items()}
        made = {(name, group): _mean(core) for name, by_group in found.items() for group, core in by_group.items()}
    return beside_inputs(made, args, kwargs)


def _cores_at(cores: AdapterCores, channel: CoreChannel, signals: NoiseSignals | None) -> dict[tuple[str, str], Tensor]:
    names = active_adapter_names(channel)
    found = {name: core_set.at(of_adapter(name, signals, names)) for name, core_set in cores.items()}
    return {(name, group): core for name, by_group in found.items() for group, core in by_group.items()}


def _mean(core: Tensor) -> Tensor:
    return core.mean(0, keepdim=True)


def _signals_of_forward(
    cores: AdapterCores, channel: CoreChannel, source: NoiseSource | None, root: nn.Module, args: Any, kwargs: Any
) -> NoiseSignals | None:
    signals = active_signals(channel)
    _warn_of_constant(cores, channel)
    if signals is None and source is not None and depend_on_noise(cores):
        signals = as_signals(*source(root, args, kwargs))
    if signals is not None and channel.one_level:
        check_one_level(signals, root)
    if signals is not None and channel.sample_major:
        check_batch(signals, source, arguments_of(root, args, kwargs))
        check_not_split(root, len(signals.noise_level))
    return check_signals(
        cores,
        None if signals is None else as_read(channel, signals),
        "call the model inside `with noise_level(model, value):`, or let it read λ from its own inputs by "
        f"`set_noise_source(model, source)`.{denoiser_hint(root)}",
    )


def _warn_of_constant(cores: AdapterCores, channel: CoreChannel) -> None:
    """Say once a `noise_level(…)` that its λ becomes a constant of what is traced inside of it."""
    told = innermost(channel, NoiseSignals) if is_traced() and depend_on_noise(cores) else None
    if told is None or told.in_trace or told.is_warned_of:
        return
    told.is_warned_of = True
    levels = ", ".join(f"{level:.6g}" for level in _untraced(told.value.noise_level))
    warnings.warn(
        f"What is traced here keeps λ = {levels} for good: torch.jit.trace, torch.export and torch.onnx.export see no "
        "noise_level(…) around them, so that its λ is a constant of the graph, whatever a later one says. To have λ "
        "read from the model's inputs, trace outside of noise_level(…), with set_noise_source(model, source).",
        UserWarning,
        stacklevel=2,
    )


def _untraced(signal: Tensor) -> list[float]:
    """The values of `signal`, without a look at them becoming a part of the graph."""
    tracer: Any = torch._C
    state = tracer._get_tracing_state()
    tracer._set_tracing_state(None)
    try:
        return signal.tolist()
    finally:
        tracer._set_tracing_state(state)


# ---------------------------------------------------------------------- a part that is called by itself


class CoresOnDemand(Mapping[tuple[str, str], Tensor]):
    """Per-forward cores that are made each time that a layer reads one, so that none outlives an optimizer step."""

    def __init__(self, keys: list[tuple[str, str]], core: Callable[[str, str], Tensor]) -> None:
        self._keys = keys
        self._core = core

    def __getitem__(self, key: tuple[str, str]) -> Tensor:
        if key not in self._keys:
            raise KeyError(key)
        return self._core(*key)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def cores_of_part(cores: AdapterCores, channel: CoreChannel, kept_on_disk: bool) -> PerForwardCores | None:
    """The cores for a part of the root that is called by itself; sources of λ are not asked.

    None where λ is not known, and in a backward pass that began after λ was told: what it recomputes may have had
    another.

    Args:
        kept_on_disk: whether group offloading keeps the cores on disk.

    Raises:
        ValueError: λ is known, but that of the part's rows is not; or the cores have no values in memory, or not all.
    """
    told, grid = innermost(channel, NoiseSignals), grid_of(channel)
    began = -1 if told is None else told.backward
    if not is_current(began) or (told is None and grid is None and depend_on_noise(cores)):
        return None
    signals = grid or (None if told is None else told.value)
    check_signals(cores, signals, "")
    if grid is None:
        _warn_of_constant(cores, channel)
    _check_part(cores, channel, signals, grid is not None, kept_on_disk)
    names = None if grid else active_adapter_names(channel)

    def core(adapter_name: str, group: str) -> Tensor:
        found = cores[adapter_name].matrix(group, of_adapter(adapter_name, signals, names))
        return found if grid is None else _mean(found)

    return CoresOnDemand([(name, group) for name, core_set in cores.items() for group in core_set.groups], core)


def _check_part(
    cores: AdapterCores, channel: CoreChannel, signals: NoiseSignals | None, is_grid: bool, kept_on_disk: bool
) -> None:
    remedy = "call the whole model instead of a part of it"
    if kept_on_disk:
        raise ValueError(f"Group offloading keeps the cores on disk while no forward of the model runs: {remedy}.")
    if any(is_sharded(core.cores if isinstance(core, ScheduledCores) else core) for core in cores.values()):
        raise ValueError(
            f"The cores are sharded between processes, and only a forward of the model brings them together: {remedy}."
        )
    if is_noise_changed(channel):
        raise ValueError(f"changed_noise changes λ once a forward of the whole model: {remedy}.")
    values = 1 if signals is None or is_grid else len(signals.noise_level)
    if (channel.sample_major or channel.one_level) and values > 1:
        raise ValueError(
            f"noise_level has {values} values, but a part of a model whose layers may see several rows a sample is "
            f"called by itself, so that its samples cannot be told apart: pass one value, or {remedy}."
        )
