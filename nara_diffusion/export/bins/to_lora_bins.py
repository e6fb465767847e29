"""Export of a NaRA to several plain LoRAs with strengths over λ.

    ΔW(λ) ≈ Σ_k φ_k(λ) · s B C_k A,      Σ_k φ_k = 1, at most two φ above 0 at one λ

Each φ is piecewise linear, so it is a `StrengthSchedule`. All LoRAs have the same A. core_type "knots" is such a sum
exactly, and so are Multi-LoRA ("bins") and T-LoRA ("rank_mask"), with φ that are 0 or 1 and LoRAs of only the
directions that are in use. For other cores the C_k are fitted by least squares (`core_samples`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from nara_diffusion.noise.signals import Level
from nara_diffusion.noise.strength import StrengthSchedule
from nara_diffusion.tuner.lora_starts import changes_base
from nara_diffusion.utils.atomic_write import atomic_write_files

from ..adapted_layers import Adapter, read_adapter
from ..best import Density, midpoints
from ..errors import ExportError
from ..fold import assembled
from ..lora.config import with_ranks_of
from ..lora.plain_lora import PlainLora, PlainLoraLayer
from ..lora.scheduler import warn_of_scheduler
from ..outputs import OUTPUT_LEVELS, Batch, Outputs
from ..update_norm import CoreKey
from .breakpoints import breakpoints
from .core_samples import Blend, CoreSamples
from .earlier_parts import refuse_earlier_parts
from .hat_functions import exact_blend, linear_blends
from .partition import constant_blends

SCHEDULE_FILE = "lora_bins.json"
MOST = 64
_EXACT = 1e-6
Interpolation = Literal["linear", "constant"]


@dataclass(frozen=True)
class LoraBins:
    """Plain LoRAs and the strength of each over λ.

    Attributes:
        loras: K plain LoRAs.
        schedules: the strength φ_k of each over λ; they sum to 1 at each λ.
        noise_levels: λ_k (K,), at which φ_k is 1: a knot, or the middle of its part.
        error: the error over λ.
    """

    loras: list[PlainLora]
    schedules: list[StrengthSchedule]
    noise_levels: list[float]
    error: ExportError

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write a folder in PEFT's format for each LoRA, lora_bins.json with the schedules, and the error.

        All files are written, or none.

        Raises:
            ValueError: `directory` is a file, or has LoRAs of an earlier export that would stay.
        """
        folder = Path(directory)
        if folder.is_file():
            raise ValueError(f"directory '{folder}' is a file: name a folder.")
        content = [
            {"folder": f"lora-{index}", "noise_level": level, "strength": schedule.as_lists()}
            for index, (level, schedule) in enumerate(zip(self.noise_levels, self.schedules, strict=True))
        ]
        refuse_earlier_parts(folder, [str(entry["folder"]) for entry in content], r"lora-\d+")
        with atomic_write_files(folder) as partial:
            for entry, lora in zip(content, self.loras, strict=True):
                lora.save_pretrained(partial / str(entry["folder"]))
            (partial / SCHEDULE_FILE).write_text(json.dumps({"loras": content}, indent=2) + "\n", encoding="utf-8")
            self.error.save(partial)


def read_lora_bins(directory: str | os.PathLike[str]) -> list[tuple[Path, StrengthSchedule]]:
    """Read what `LoraBins.save_pretrained` wrote: the folder and the strength of each LoRA.

    Raises:
        ValueError: there is no lora_bins.json, or it is damaged.
    """
    path = Path(directory) / SCHEDULE_FILE
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["loras"]
        return [(path.parent / entry["folder"], StrengthSchedule(entry["strength"])) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"'{path}' can't be read ({error!r}): pass a folder that LoraBins.save_pretrained wrote."
        ) from error


def to_lora_bins(
    model: nn.Module,
    bins: int | None = None,
    adapter_name: str = "default",
    *,
    bound: float | None = None,
    interpolation: Interpolation = "linear",
    density: Density | None = None,
    mask_density: Level | None = None,
    batch: Batch | None = None,
) -> LoraBins:
    """The adapter of `model` as K plain LoRAs and the strength of each over λ; the model stays as it is.

    Cores of type "knots", "bins" and "rank_mask", and adapters that don't depend on λ, need neither `bins` nor `bound`
    and are exact up to rounding. Other cores are approximated by least squares over λ.

    Args:
        model: as for `to_lora`. adapter_name: the name of the adapter.
        bins: K, the largest number of LoRAs, 1 to 64; fewer are returned if they are exact.
        bound: in place of `bins`, the largest error of ΔW at any λ (see `ExportError.update`), greater than 0: as few
            LoRAs as possible are returned.
        interpolation: "linear": each LoRA fades into the next. "constant": one LoRA at a time, for hosts that switch
            between LoRAs; each is the mean over its part of [0, 1].
        density: how often each λ occurs, as for `to_lora`; None means equally often.
        mask_density: for `core_input` "mask_density" or "both": one value in [0, 1], the same at each λ.
        batch: as for `to_lora`; the errors of the model's outputs are measured then.

    Raises:
        ValueError: as `to_lora`; the adapter can't be a sum of LoRAs (DoRA, biases, modules_to_save, an initialisation
            that changes the base); neither `bins` nor `bound` where one is needed, or both; 64 LoRAs exceed `bound`.
    """
    _check_arguments(bins, bound, interpolation)
    with read_adapter(model, adapter_name) as adapter:
        adapter.signals(0.5, mask_density)  # raises if λ or the mask density is missing
        _check_summable(adapter)
        samples = CoreSamples(adapter, breakpoints(adapter), density, mask_density)
        blend = _blend(samples, bins, bound, interpolation, adapter_name)
        cores = samples.mixed(blend.mixing)
        loras = [_lora(adapter, cores, index) for index in range(len(blend.schedules))]
        for lora in loras:
            if lora.others:
                raise ValueError(
                    _refusal(adapter_name, f"'{next(iter(lora.others))}', which each LoRA would add again")
                )
        error = blend.error
        if batch is not None:
            outputs = Outputs(model, adapter, batch, mask_density)
            levels = midpoints(OUTPUT_LEVELS)
            found = outputs.errors(levels, lambda level: _played(adapter, cores, blend.schedules, level))
            error = replace(error, output_levels=levels.tolist(), output=found)
        warn_of_scheduler(loras[0].scheduler)
        return LoraBins(loras, blend.schedules, blend.noise_levels, error)


def _played(
    adapter: Adapter, cores: Mapping[CoreKey, Tensor], schedules: list[StrengthSchedule], levels: Tensor
) -> dict[str, Tensor]:
    """Σ φ_k C_k of each layer at λ (n,): (n or 1, r, r)."""
    shares = torch.stack([schedule.at(levels) for schedule in schedules], dim=1).double()  # (n, K)
    found = {key: core if len(core) == 1 else torch.einsum("nk,krs->nrs", shares, core) for key, core in cores.items()}
    return {layer.name: found[layer.key][:, : layer.rank, : layer.rank] for layer in adapter.layers}


# ---------------------------------------------------------------------- which strengths


def _blend(samples: CoreSamples, bins: int | None, bound: float | None, interpolation: str, name: str) -> Blend:
    """The blend of as few LoRAs as keep to `bound`, or of at most `bins`."""
    if interpolation == "linear":
        exact = exact_blend(samples)
        if exact.error.worst_update <= _EXACT and (bins is None or len(exact.schedules) <= bins):
            return exact
        if bins is None and bound is None:
            raise ValueError(_inexact(name, len(exact.schedules)))
    blends = (linear_blends if interpolation == "linear" else constant_blends)(samples, worst=bins is None)
    best = None
    for best in islice(blends, bins or MOST):
        if best.error.worst_update <= (bound or _EXACT):
            return best
    assert best is not None
    if bound is not None:
        raise ValueError(
            f"bound is {bound:g}, but {len(best.schedules)} LoRAs have an error of {best.error.worst_update:.3g}: "
            f"pass a larger bound, or bins={MOST} in place of it."
        )
    if bins is None:
        raise ValueError(_inexact(name, len(best.schedules)))
    return best


def _inexact(name: str, number: int) -> str:
    return (
        f"Adapter '{name}' is not exactly a sum of {number} LoRAs: pass bins, their number, or bound, the largest "
        "relative error of ΔW at any λ, such as 0.01."
    )


# ---------------------------------------------------------------------- the LoRAs


def _lora(adapter: Adapter, cores: Mapping[CoreKey, Tensor], index: int) -> PlainLora:
    def core_of(layer: Any) -> Tensor:
        core = cores[layer.key]
        return core[index if len(core) > 1 else 0][: layer.rank, : layer.rank]

    lora = assembled(adapter, core_of)
    layers = {name: _without_unused(layer) for name, layer in lora.layers.items()}
    if all(layer.rank == lora.layers[name].rank for name, layer in layers.items()):
        return lora
    return replace(lora, config=with_ranks_of(lora.config, layers), layers=layers)


def _without_unused(layer: PlainLoraLayer) -> PlainLoraLayer:
    """Remove the directions whose columns of B are zero, since a mask has switched them off; at least one stays."""
    if layer.B.shape[1] != layer.rank:  # a convolution with groups
        return layer
    used = layer.B.transpose(0, 1).flatten(1).any(1).nonzero().flatten()
    if len(used) in (0, layer.rank):
        return layer
    return replace(
        layer, A=layer.A[used], B=layer.B[:, used].contiguous(), alpha=layer.scaling * len(used), rank=len(used)
    )


# ---------------------------------------------------------------------- refused


def _check_arguments(bins: Any, bound: Any, interpolation: Any) -> None:
    if interpolation not in get_args(Interpolation):
        raise ValueError(f"interpolation is {interpolation!r}: pass 'linear' or 'constant'.")
    if bins is not None and bound is not None:
        raise ValueError("bins and bound both limit the number of LoRAs: pass one of them.")
    if bins is not None and not (isinstance(bins, int) and not isinstance(bins, bool) and 1 <= bins <= MOST):
        raise ValueError(f"bins is {bins!r}: pass a number of LoRAs, an int from 1 to {MOST}.")
    if bound is not None and not (isinstance(bound, (int, float)) and bound > 0):
        raise ValueError(f"bound is {bound!r}: pass the largest error of ΔW at any λ, greater than 0, such as 0.01.")


def _check_summable(adapter: Adapter) -> None:
    name, config = adapter.name, adapter.config
    if config.use_dora:
        raise ValueError(_refusal(name, "DoRA, whose norm is not linear in the update"))
    if config.lora_bias or config.bias != "none":
        raise ValueError(_refusal(name, "biases, which each LoRA would add again"))
    if changes_base(config.init_lora_weights):
        raise ValueError(_refusal(name, f"init_lora_weights={config.init_lora_weights!r}, which has changed the base"))


def _refusal(adapter_name: str, what: str) -> str:
    return (
        f"Adapter '{adapter_name}' can't be a sum of LoRAs, since it has {what}: use to_lora(model, noise_level=λ), "
        "the LoRA of one λ."
    )
