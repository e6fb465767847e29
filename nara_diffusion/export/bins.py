"""Export of a NaRA to several plain LoRAs with strengths over λ.

    ΔW(λ) ≈ Σ_k φ_k(λ) · s B C_k A,      Σ_k φ_k = 1, at most two φ above 0 at one λ

Each φ is a hat function between knots, 1 at its own and 0 at the others, so it is a `StrengthSchedule`; neighbouring
knots with the same C share one φ, which is 1 from the first to the last. All LoRAs have the same A. core_type "knots"
is such a sum exactly. For other cores the C_k are fitted by least squares on a grid of λ_i with weights w_i:

    min over C_1 … C_K of Σ_i w_i ‖s B (Σ_k φ_k(λ_i) C_k − C(λ_i)) A‖²,      C_k = Σ_i T_ki C(λ_i),  T = (√w Φ)⁺ √w

These are the nearest for any B and A: the derivative by C_k is zero in all layers at once where the sum of
w_i φ_k(λ_i) (Σ_l φ_l(λ_i) C_l − C(λ_i)) is. Knots are placed uniformly, or one after the other where the error is
largest; the placement with the smallest error is taken.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from nara_diffusion.config import changes_base
from nara_diffusion.noise.strength_schedule import StrengthSchedule
from nara_diffusion.utils.atomic_write import atomic_write_files

from .adapter_factors import Adapter, adapter_of_model
from .plain_lora import ExportError, PlainLora, warn_of_scheduler
from .to_lora import CoreSamples

SCHEDULE_FILE = "lora_bins.json"
_MOST = 64
_EXACT = 1e-6


@dataclass(frozen=True)
class LoraBins:
    """Plain LoRAs and the strength of each over λ.

    Attributes:
        loras: K plain LoRAs.
        schedules: the strength φ_k of each over λ; they sum to 1 at each λ.
        noise_levels: λ_k (K,), the first knot at which φ_k is 1.
        error: the error over λ.
    """

    loras: list[PlainLora]
    schedules: list[StrengthSchedule]
    noise_levels: list[float]
    error: ExportError

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write a folder in PEFT's format for each LoRA, lora_bins.json with the schedules, and the error.

        All files are written, or none. What else is in the folder stays.
        """
        folders = [f"lora-{index}" for index in range(len(self.loras))]
        with atomic_write_files(Path(directory)) as partial:
            for folder, lora in zip(folders, self.loras, strict=True):
                lora.save_pretrained(partial / folder)
            self.save_strengths(partial, "folder", folders)

    def save_strengths(self, directory: Path, kind: str, names: Sequence[str]) -> None:
        """Write lora_bins.json, the strength of each LoRA, by its "file" or "folder" (`kind`); and the error."""
        rows = zip(names, self.noise_levels, self.schedules, strict=True)
        content = [{kind: name, "noise_level": level, "strength": each.as_lists()} for name, level, each in rows]
        text = json.dumps({"loras": content}, indent=2) + "\n"
        (directory / SCHEDULE_FILE).write_text(text, encoding="utf-8")
        self.error.save(directory)


def read_lora_bins(directory: str | os.PathLike[str]) -> list[tuple[Path, StrengthSchedule]]:
    """Read what `LoraBins.save_pretrained` wrote: the folder and the strength of each LoRA.

    Raises:
        ValueError: there is no lora_bins.json.
    """
    path = Path(directory) / SCHEDULE_FILE
    if not path.is_file():
        raise ValueError(f"There is no '{path}': pass a folder that LoraBins.save_pretrained wrote.")
    entries = json.loads(path.read_text(encoding="utf-8"))["loras"]
    return [(path.parent / entry["folder"], StrengthSchedule(entry["strength"])) for entry in entries]


def to_lora_bins(
    model: nn.Module,
    bins: int | None = None,
    adapter_name: str = "default",
) -> LoraBins:
    """The adapter of `model` as K plain LoRAs and the strength of each over λ; the model stays as it is.

    Cores of type "knots", and adapters that don't depend on λ, need no `bins` and are exact up to rounding. Other cores
    are approximated by least squares over λ.

    Args:
        model: as for `to_lora`. adapter_name: the name of the adapter.
        bins: K, the largest number of LoRAs, 1 to 64; fewer are returned if they are exact.

    Raises:
        ValueError: as `to_lora`; the adapter can't be a sum of LoRAs (DoRA, masks that change in steps,
            modules_to_save, an initialisation that changes the base); no `bins` where it is needed.
    """
    with adapter_of_model(model, adapter_name) as adapter:
        return bins_of(adapter, bins)


def bins_of(adapter: Adapter, bins: int | None) -> LoraBins:
    """As `to_lora_bins`, of an adapter of a model or of a file."""
    if bins is not None and not (isinstance(bins, int) and 1 <= bins <= _MOST):
        raise ValueError(f"bins is {bins!r}: pass a number of LoRAs, an int from 1 to {_MOST}.")
    _check_summable(adapter)
    samples = CoreSamples(adapter)
    played, mixing = _blend(samples, bins)
    cores = samples.mixed(mixing)
    loras = [adapter.folded({name: C[index] for name, C in cores.items()}) for index in range(len(mixing))]
    warn_of_scheduler(adapter.lora.scheduler)
    return replace(played, loras=loras)


def _check_summable(adapter: Adapter) -> None:
    config, others, why = adapter.config, adapter.lora.others, None
    if (kind := getattr(config, "core_type", None)) in ("bins", "rank_mask"):
        why = f"core_type {kind!r}, a mask that changes in steps between the λ at which errors are measured"
    elif config.use_dora:
        why = "DoRA, whose norm is not linear in the update"
    elif changes_base(config.init_lora_weights):
        why = f"init_lora_weights={config.init_lora_weights!r}, which has changed the base"
    elif others:
        why = f"'{next(iter(others))}', which each LoRA would add again"
    if why:
        raise ValueError(
            f"The adapter can't be a sum of LoRAs, since it has {why}: use to_lora(model, noise_level=λ), the LoRA of "
            "one λ."
        )


# ---------------------------------------------------------------------- which strengths


_Blend = tuple[LoraBins, Tensor]
"""What is played, without its LoRAs, and T (K, n) of their cores C_k = Σ_i T_ki C(λ_i)."""


def _blend(samples: CoreSamples, bins: int | None) -> _Blend:
    """The exact blend, if it has at most `bins` LoRAs; else the best of `bins` LoRAs that was found."""
    exact, mixing = _of_knots(samples, samples.breakpoints)
    if exact.error.worst_update <= _EXACT and (bins is None or len(mixing) <= bins):
        return exact, mixing
    if bins is None:
        raise ValueError(f"The adapter is not exactly a sum of {len(mixing)} LoRAs: pass bins, their number.")
    wanted = torch.linspace(0, 1, bins, dtype=torch.float32) if bins > 1 else torch.tensor([0.5])
    uniform = (samples.levels[:, None] - wanted).abs().argmin(0).tolist()
    starts = (samples.breakpoints, [0, len(samples.levels) - 1])
    placements = [uniform, *(_grown(samples, start, bins) for start in starts)]
    fits = [_of_knots(samples, knots, fitted=True) for knots in placements if knots is not None]
    return min(fits, key=lambda blend: blend[0].error.mean_update)


def _grown(samples: CoreSamples, knots: list[int], number: int) -> list[int] | None:
    """Add knots where the interpolation of C is farthest from C(λ), until they have `number` φ; None if they can't."""
    while len(_runs(samples, knots)) < number:
        errors = torch.tensor(_of_knots(samples, knots)[0].error.update, dtype=torch.float64)
        errors[knots] = 0
        if not errors.any():
            return None
        knots = sorted([*knots, int(errors.argmax())])
    return knots if len(_runs(samples, knots)) == number else None


def _of_knots(samples: CoreSamples, knots: list[int], fitted: bool = False) -> _Blend:
    """The blend whose C_k are C at the first knot of each run of equal C, or fitted by least squares."""
    levels, runs = samples.levels[knots].tolist(), _runs(samples, knots)
    chosen, schedules = [knots[run[0]] for run in runs], [_hat(levels, run) for run in runs]
    shares = torch.stack([schedule.at(samples.levels) for schedule in schedules], dim=1).double()  # Φ (n, K)
    root = samples.weights.sqrt()
    if fitted:
        mixing = torch.linalg.pinv(root[:, None] * shares) * root
    else:
        mixing = torch.eye(len(samples.levels), dtype=torch.float64)[chosen]
    return LoraBins([], schedules, samples.levels[chosen].tolist(), samples.error(shares, mixing)), mixing


def _runs(samples: CoreSamples, knots: list[int]) -> list[list[int]]:
    """The indices of the knots, grouped into runs of equal C."""
    number = [0, *accumulate(not samples.same(*pair) for pair in pairwise(knots))]
    return [[index for index, own in enumerate(number) if own == run] for run in range(number[-1] + 1)]


def _hat(levels: list[float], run: list[int]) -> StrengthSchedule:
    """The schedule that is 1 on the run, and 0 up to the λ before it and from the λ after it."""
    first, last = run[0], run[-1]
    corners = sorted({max(first - 1, 0), first, last, min(last + 1, len(levels) - 1)})
    return StrengthSchedule([(levels[index], float(first <= index <= last)) for index in corners])
