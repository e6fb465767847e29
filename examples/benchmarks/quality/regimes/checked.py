"""A regime as nara-check sees a training: its own data, loss and held-out samples; records, and their table."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nara_diffusion.check.trials import CheckSettings, CheckTask, published
from nara_diffusion.check.verdict import LIKELY, UNLIKELY, decide, mean_losses, relative_difference
from nara_diffusion.dllm.masking import MaskedBatch
from nara_diffusion.dreambooth.families import SDXL
from nara_diffusion.dreambooth.objectives import squared_errors
from nara_diffusion.utils.statistics import Interval
from quality import results
from quality.images.held_out import BINS, HeldOut
from quality.regimes.image_regimes import LEVELS
from quality.regimes.plan import PLAN
from quality.regimes.report import Confirmed, confirmed
from quality.regimes.runs import REGIMES, Cell, arm_arguments, build, rounded
from quality.regimes.text.corruption import token_losses
from quality.regimes.text.denoising import Denoising
from quality.regimes.text.models import logits_of
from quality.report.data import below_zero, table

# ---------------------------------------------------------------------- tasks


class CheckLosses(NamedTuple):
    """The mean, and the losses (n,) and λ (n,) of samples."""

    loss: Tensor
    per_sample: Tensor
    noise_level: Tensor


Measured = Callable[[Any], CheckLosses]
"""The losses of a model on held-out samples."""


def check_task(cell: Cell, rates: dict[str, float], seed: int) -> CheckTask:
    """The training of a cell's NaRA, with `rates`."""
    regime = REGIMES[cell.regime]
    options = {"targets": cell.targets, "rank": cell.rank, "steps": cell.steps}
    args: Any = published(arm_arguments("nara", **options, seed=seed, backbone=regime.backbone, **rates))
    torch.manual_seed(seed)
    model = build("nara", args, regime.backbone).train()
    step = regime.loss(regime.backbone.controlled(model, None, seed), args)
    size = args.train_batch_size
    measured = [list(parts) for parts in _measured(cell.regime, size)]

    def loss(positions: Sequence[int]) -> CheckLosses:
        value = step(positions[0] // size)
        return CheckLosses(value, value[None], torch.zeros(1))

    def held_out(positions: Sequence[int]) -> CheckLosses:
        """A chunk of positions is a part of one bin of λ: of the next bin for the next chunk."""
        chunk = positions[0] // size
        parts = measured[chunk % BINS]
        return parts[chunk // BINS % len(parts)](model)

    return CheckTask(model, model.peft_config["default"], args, loss, held_out, size, size)


def _measured(name: str, size: int) -> list[Iterator[Measured]]:
    """The held-out samples of each bin of λ, in parts of `size`."""
    regime: Any = REGIMES[name]
    parts: Any = _text_parts if isinstance(regime, Denoising) else _image_parts
    return [parts(regime, batch, size) for batch in regime.held_out()]


def _image_parts(regime: Any, batch: HeldOut, size: int) -> Iterator[Measured]:
    count = max(1, len(batch.time_ids) // size)
    for first in range(count):
        yield partial(_errors, batch.rows(slice(first, None, count)))


def _errors(rows: HeldOut, unet: Any) -> CheckLosses:
    losses = squared_errors(_predicted(unet, rows), rows.batch)
    return CheckLosses(losses.mean(), losses, rows.batch.timestep / LEVELS)


@torch.no_grad()
def _predicted(unet: Any, rows: HeldOut) -> Tensor:
    return SDXL.predict(unet, rows.batch.model_input, rows.batch.timestep, rows.time_ids, rows.embeddings)


def _text_parts(regime: Denoising, batch: MaskedBatch, size: int) -> Iterator[Measured]:
    count = max(1, len(batch.input_ids) // size)
    for first in range(count):
        chosen = {name: value if value is None else value[first::count] for name, value in vars(batch).items()}
        rows = MaskedBatch(**chosen)
        yield partial(_text_losses, regime, rows)


@torch.no_grad()
def _text_losses(regime: Denoising, rows: MaskedBatch, model: Any) -> CheckLosses:
    """The mean over the tokens that count; 0 where a sample has none."""
    counted = regime.corruption.counted(rows)
    losses = (token_losses(logits_of(model, rows), rows) * counted).sum(1) / counted.sum(1).clamp(min=1)  # (n,)
    return CheckLosses(losses.mean(), losses, rows.noise_level)


# ---------------------------------------------------------------------- rows

ROWS = {
    name: Cell(
        name.partition(":")[0],
        "all" if name.endswith(":all") else "attention",
        *((16, 400) if name == "one_image" else (4, 200)),
    )
    for name in (
        *("eps_to_v", "eps_to_v:all", "eps_to_flow", "zero_snr", "subject", "subject_low", "subject_high"),
        *("two_conditions", "one_image", "blind_open", "blind_determined", "seen_open", "seen_determined"),
    )
}
"""{name: what was checked}, in the table's order; what isn't in `REGIMES` any more has records alone."""
IMAGE_RATES = {"learning_rate": 1e-2, "core_learning_rate": 2.5e-3}
TEXT_RATES = {"learning_rate": 1e-2, "core_learning_rate": 1e-3}


def left_rows(rows: Sequence[str], seeds: Sequence[int], records: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """(row, seed) of which there is no record."""
    done = {(record["row"], record["seed"]) for record in records}
    return [(row, seed) for seed in seeds for row in rows if (row, seed) not in done]


def check_row(row: str, seed: int, settings: CheckSettings | None = None) -> dict[str, Any]:
    """Checks, and says what it found and was made with."""
    wall, core = time.perf_counter(), time.process_time()
    cell = ROWS[row]
    is_text = isinstance(REGIMES[cell.regime], Denoising)
    task = check_task(cell, TEXT_RATES if is_text else IMAGE_RATES, seed)
    settings = settings or CheckSettings(samples=max(CheckSettings().samples, BINS * task.batch_size))
    repeats, verdict = decide(task, settings, progress=True)
    found = {other: _as_dict(relative_difference(repeats, other)) for other in ("lora", "untold")}
    return {
        "row": row,
        "seed": seed,
        "verdict": verdict.answer,
        "reason": verdict.reason,
        "repeats": len(repeats),
        **rounded({"differences": found, "losses": mean_losses(repeats)}),
        "seconds": round(time.perf_counter() - wall, 1),
        "core_seconds": round(time.process_time() - core, 1),
        "date": results.now(),
        "command": shlex.join(["python", *sys.argv]),
        **results.provenance(),
    }


def _as_dict(values: Interval) -> dict[str, float]:
    return {"mean": values.mean, "low": values.low, "high": values.high}


# ---------------------------------------------------------------------- table

Record = Mapping[str, Any]
RIGHT, WRONG, OPEN = "right", "**wrong**", "–"
ALONE = {"subject": False}
"""{row: whether λ pays}, of what RESULTS.md answers and not a regime of the plan."""


def check_table(records: Sequence[Record], known: Sequence[Record]) -> str:
    """A line a record, in the order of `ROWS`."""
    order = list(ROWS)
    rows = [_row(record, known) for record in sorted(records, key=lambda r: (order.index(r["row"]), r["seed"]))]
    header = ["regime", "seed", "known", "against LoRA", "against NaRA without λ", "repeats", "verdict", "is it?"]
    return table(header, rows)


def _row(record: Record, known: Sequence[Record]) -> list[str]:
    cell = _confirmed(record["row"], known)
    differences = [_described(record["differences"][other]) for other in ("lora", "untold")]
    verdict, pays = record["verdict"], _pays(record["row"], cell)
    named = [record["row"], str(record["seed"]), _known(record["row"], cell), *differences, str(record["repeats"])]
    return [*named, verdict, _judged(verdict, pays)]


def _judged(verdict: str, pays: bool | None) -> str:
    if pays is None or verdict not in (LIKELY, UNLIKELY):
        return OPEN
    return RIGHT if (verdict == LIKELY) == pays else WRONG


def _confirmed(row: str, known: Sequence[Record]) -> Confirmed | None:
    """The confirmation of the row's cell, if all its runs are there."""
    cells = [confirmed(planned, known) for planned in PLAN if planned.cell == ROWS[row]]
    return cells[0] if cells and cells[0].is_whole else None


def _pays(row: str, cell: Confirmed | None) -> bool | None:
    """Whether NaRA is below LoRA and below itself without λ, both clear of zero; None where runs say nothing."""
    if cell is None:
        return ALONE.get(row)
    found = [cell.difference("nara", other) for other in ("lora", "nara_constant") if other in cell.planned.arms]
    return None if None in found else all(each is not None and below_zero(each) for each in found)


def _known(row: str, cell: Confirmed | None) -> str:
    """The relative difference of NaRA's and LoRA's mean scores."""
    if cell is None:
        return "no gain" if ALONE.get(row) is False else "open"
    if _pays(row, cell) is None:
        return "no interval"
    nara, lora = (fmean(r["score"] for (name, _), r in cell.records.items() if name == arm) for arm in ("nara", "lora"))
    return f"{_percent(nara / lora - 1)}, {'pays' if _pays(row, cell) else 'no gain from λ'}"


def _described(difference: Mapping[str, float]) -> str:
    return f"{_percent(difference['mean'])} ({_percent(difference['low'])} to {_percent(difference['high'])})"


def _percent(share: float) -> str:
    return f"{100 * share:+.1f} %".replace("-", "−")
