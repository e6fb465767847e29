"""A NaRA as several plain LoRAs, whose strengths over λ blend one into the next.

    ΔW(λ) ≈ Σ_k φ_k(λ) · s B C(λ_k) A,      Σ_k φ_k = 1, at most two φ above 0 at one λ

φ are piecewise linear, so each is a `StrengthSchedule`. LoRAs share A. Knots are such a sum exactly, and Multi-LoRA's
and T-LoRA's masks are, by φ that are 0 or 1; of a mask, each LoRA keeps the directions alone that it uses. Other cores
are sampled at the λ_k that make the error small: the next λ_k is always where the error is largest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nara_diffusion.noise.strength import StrengthSchedule
from nara_diffusion.tuner.lora_starts import changes_base
from nara_diffusion.utils.atomic_write import atomic_write_files

from .adapted_layers import Adapter, read_adapter
from .best import midpoints
from .breakpoints import as_levels, breakpoints, is_same
from .errors import ExportError, relative
from .fold import assembled
from .lora_config import with_ranks
from .outputs import OUTPUT_LEVELS, Batch, Outputs
from .plain_lora import PlainLora, PlainLoraLayer
from .update_norm import CoreKey, UpdateNorm, cores_over

SCHEDULE_FILE = "lora_bins.json"
MOST = 64
_GRID = 257
_EXACT = 1e-6


@dataclass(frozen=True)
class LoraBins:
    """Plain LoRAs and the strength of each over λ.

    Attributes:
        loras: K of them. schedules: the strength of each; at each λ their sum is 1. noise_levels: λ_k (K,) at which
            each is the NaRA's. error: measured over λ.
    """

    loras: list[PlainLora]
    schedules: list[StrengthSchedule]
    noise_levels: list[float]
    error: ExportError

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write a folder in PEFT's format for each LoRA, lora_bins.json with the schedules, and the error."""
        folder = Path(directory)
        if folder.is_file():
            raise ValueError(f"directory '{folder}' is a file: name a folder.")
        content = [
            {"folder": f"lora-{index}", "noise_level": level, "strength": schedule.as_lists()}
            for index, (level, schedule) in enumerate(zip(self.noise_levels, self.schedules, strict=True))
        ]
        with atomic_write_files(folder) as partial:
            for entry, lora in zip(content, self.loras, strict=True):
                lora.save_pretrained(partial / str(entry["folder"]))
            (partial / SCHEDULE_FILE).write_text(json.dumps({"loras": content}, indent=2) + "\n", encoding="utf-8")
            self.error.save(partial)


def read_lora_bins(directory: str | os.PathLike[str]) -> list[tuple[Path, StrengthSchedule]]:
    """The folder and the strength of each LoRA that `LoraBins.save_pretrained` wrote.

    Raises:
        ValueError: there is no lora_bins.json, or it is damaged.
    """
    path = Path(directory) / SCHEDULE_FILE
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["loras"]
        return [(path.parent / entry["folder"], StrengthSchedule(entry["strength"])) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"'{path}' can't be read ({error!r}): pass the folder that LoraBins wrote.") from error


def to_lora_bins(
    model: nn.Module,
    bins: int | None = None,
    adapter_name: str = "default",
    *,
    bound: float | None = None,
    mask_density: float | None = None,
    batch: Batch | None = None,
) -> LoraBins:
    """The adapter of `model` as K plain LoRAs and the strength of each over λ; the model stays as it is.

    Knots, masks and what doesn't depend on λ need neither `bins` nor `bound` and have no error but rounding.

    Args:
        model: as for `to_lora`. adapter_name: likewise.
        bins: K, at most; fewer where that is exact. bound: of the error of ΔW at each λ (see `ExportError.update`),
            greater than 0: as few LoRAs as keep to it.
        mask_density: for `core_input` "mask_density" or "both", in [0, 1], the same at each λ.
        batch: as for `to_lora`; errors of the model's outputs are measured then, too.

    Raises:
        ValueError: as `to_lora`; an adapter that a sum of LoRAs can't be (DoRA, biases, modules that are trained as a
            whole, a start that has changed the base); neither `bins` nor `bound` where they are needed, or both; more
            than 64 LoRAs would be needed.
    """
    _check_arguments(bins, bound)
    with read_adapter(model, adapter_name) as adapter:
        adapter.signals(0.5, mask_density)  # all that is needed is known
        _check_summable(adapter)
        samples = _sampled(adapter, bins, bound, mask_density)
        loras = [_lora_at(adapter, samples, index) for index in samples.chosen]
        for lora in loras:
            if lora.others:
                raise ValueError(
                    _refusal(adapter_name, f"'{next(iter(lora.others))}', which each LoRA would have again")
                )
        error = samples.error
        if batch is not None:
            outputs = Outputs(model, adapter, batch, mask_density)
            levels = midpoints(OUTPUT_LEVELS)
            found = outputs.errors(levels, lambda level: samples.by_layer(adapter, level))
            error = replace(error, output_levels=levels.tolist(), output=found)
        return LoraBins(loras, samples.schedules, [samples.levels[index] for index in samples.chosen], error)


# ---------------------------------------------------------------------- which λ


@dataclass(frozen=True)
class _Samples:
    """Cores at `levels` (m,); `chosen` are those of which a LoRA is made, one for each run of equal ones."""

    levels: list[float]
    cores: Mapping[CoreKey, Tensor]
    chosen: list[int]
    schedules: list[StrengthSchedule]
    error: ExportError

    def blended(self, levels: Tensor) -> dict[CoreKey, Tensor]:
        return _blend(self.cores, self.chosen, self.schedules, levels)

    def by_layer(self, adapter: Adapter, levels: Tensor) -> dict[str, Tensor]:
        found = self.blended(levels)
        return {layer.name: found[layer.key][:, : layer.rank, : layer.rank] for layer in adapter.layers}


def _sampled(adapter: Adapter, bins: int | None, bound: float | None, mask_density: float | None) -> _Samples:
    norm, grid = UpdateNorm(adapter), torch.linspace(0, 1, _GRID)
    levels = breakpoints(adapter)
    samples = _samples(adapter, norm, levels, grid, mask_density)
    if bins is not None and len(samples.chosen) > bins:
        levels = torch.linspace(0, 1, bins).tolist() if bins > 1 else [0.5]
        return _samples(adapter, norm, levels, grid, mask_density)
    if bins is None and bound is None and samples.error.worst_update > _EXACT:
        raise ValueError(
            f"Adapter '{adapter.name}' is no sum of {len(samples.chosen)} LoRAs: pass bins=K, their number, or "
            "bound=ε, the largest error of ΔW at any λ."
        )
    enough = _EXACT if bound is None else bound
    while samples.error.worst_update > enough and len(samples.chosen) < (bins or MOST):
        worst = samples.error.update.index(samples.error.worst_update)
        level = samples.error.noise_levels[worst]
        if level in levels:
            break
        levels = sorted({*levels, level})
        samples = _samples(adapter, norm, levels, grid, mask_density)
    if bound is not None and samples.error.worst_update > bound:
        raise ValueError(
            f"bound is {bound:g}, but {len(samples.chosen)} LoRAs have an error of {samples.error.worst_update:.3g}: "
            f"pass a larger bound, or bins={MOST}."
        )
    return samples


def _samples(
    adapter: Adapter, norm: UpdateNorm, levels: list[float], grid: Tensor, mask_density: float | None
) -> _Samples:
    cores = cores_over(adapter, as_levels(levels), mask_density)
    runs = [[0]]
    for index in range(1, len(levels)):
        if is_same(cores, index - 1, index):
            runs[-1].append(index)
        else:
            runs.append([index])
    chosen, schedules = [run[0] for run in runs], [_schedule(levels, run) for run in runs]
    at = torch.cat([grid, as_levels(levels)]).unique()
    own = cores_over(adapter, at, mask_density)
    sizes = norm(own).expand(len(at)).tolist()
    errors = norm.difference(own, _blend(cores, chosen, schedules, at)).expand(len(at)).tolist()
    weights = [1 / len(at)] * len(at)
    error = ExportError(at.tolist(), weights, relative(errors, sizes, weights), [], [])
    return _Samples(levels, cores, chosen, schedules, error)


def _schedule(levels: list[float], run: list[int]) -> StrengthSchedule:
    """1 on the run, 0 from the λ before it down and from the λ after it up, straight in between."""
    first, last = run[0], run[-1]
    before = [(levels[first - 1], 0.0)] if first > 0 else []
    inside = [(levels[index], 1.0) for index in dict.fromkeys((first, last))]
    after = [(levels[last + 1], 0.0)] if last + 1 < len(levels) else []
    return StrengthSchedule([*before, *inside, *after])


def _blend(
    cores: Mapping[CoreKey, Tensor], chosen: list[int], schedules: list[StrengthSchedule], levels: Tensor
) -> dict[CoreKey, Tensor]:
    """Σ φ_k C_k at λ (n,): (n or 1, r, r), by the strengths as they are used."""
    shares = torch.stack([schedule.at(levels) for schedule in schedules], dim=1).double()  # (n, K)
    return {
        key: core if len(core) == 1 else torch.einsum("nk,krs->nrs", shares, core[chosen])
        for key, core in cores.items()
    }


# ---------------------------------------------------------------------- the LoRAs


def _lora_at(adapter: Adapter, samples: _Samples, index: int) -> PlainLora:
    def core_of(layer: Any) -> Tensor:
        core = samples.cores[layer.key]
        return core[index if len(core) > 1 else 0][: layer.rank, : layer.rank]

    lora = assembled(adapter, core_of)
    layers = {name: _without_unused(layer) for name, layer in lora.layers.items()}
    if all(layer.rank == lora.layers[name].rank for name, layer in layers.items()):
        return lora
    ranks = {name: layer.rank for name, layer in layers.items()}
    alphas = {name: layer.alpha for name, layer in layers.items()}
    return PlainLora(with_ranks(lora.config, ranks, alphas), layers, lora.others)


def _without_unused(layer: PlainLoraLayer) -> PlainLoraLayer:
    """Without the directions that a mask has switched off, whose columns of B are zero; one stays at least."""
    if layer.B.shape[1] != layer.rank:  # a convolution with groups
        return layer
    used = layer.B.transpose(0, 1).flatten(1).any(1).nonzero().flatten()
    if len(used) in (0, layer.rank):
        return layer
    return replace(
        layer, A=layer.A[used], B=layer.B[:, used].contiguous(), alpha=layer.scaling * len(used), rank=len(used)
    )


# ---------------------------------------------------------------------- refused


def _check_arguments(bins: Any, bound: Any) -> None:
    if bins is not None and bound is not None:
        raise ValueError("bins and bound are two ways to say how many LoRAs: pass one of them.")
    if bins is not None and not (isinstance(bins, int) and not isinstance(bins, bool) and 1 <= bins <= MOST):
        raise ValueError(f"bins is {bins!r}: pass a number of LoRAs, from 1 to {MOST}.")
    if bound is not None and not (isinstance(bound, (int, float)) and bound > 0):
        raise ValueError(f"bound is {bound!r}: pass the largest error of ΔW at any λ, greater than 0, such as 0.01.")


def _check_summable(adapter: Adapter) -> None:
    name, config = adapter.name, adapter.config
    if config.use_dora:
        raise ValueError(_refusal(name, "DoRA, whose norm is not linear in the update"))
    if config.lora_bias or config.bias != "none":
        raise ValueError(_refusal(name, "biases, which each LoRA would have again"))
    if changes_base(config.init_lora_weights):
        raise ValueError(_refusal(name, f"init_lora_weights={config.init_lora_weights!r}, which has changed the base"))


def _refusal(adapter_name: str, what: str) -> str:
    return f"Adapter '{adapter_name}' is no sum of LoRAs, since it has {what}: use to_lora(model, noise_level=λ)."
