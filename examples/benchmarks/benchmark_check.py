"""Is nara_check right where the answer is known? Runs it on the regimes of examples/benchmarks/results/regimes_plan.md.

    python examples/benchmarks/benchmark_check.py                              # the rows that --output lacks
    python examples/benchmarks/benchmark_check.py --rows eps_to_v subject --seeds 1

A row is a regime and what is adapted in it, "eps_to_v" or "eps_to_v:all". Trials, rules and defaults are nara_check's
own: short trainings of 100 steps at rank 4 and the rate 1e-2, of the core 2.5e-3 (1e-3 in text), in three to six
repeats; data, loss and held-out samples are the regime's. Each row takes one to ten minutes of a core, and becomes a
line of --output; give the same command again to go on. `report_quality.py` makes the table of check.md of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmark_record import provenance
from check.level_token import digit_tokens, with_level_token
from check.time_layers import time_layers
from check.trials import CheckTask, Loss, add_cheap, published
from check.verdict import decide, differences, mean_losses
from quality import results
from quality.images.held_out import BINS, LEVELS, held_out_losses
from quality.regimes.checked import ROWS
from quality.regimes.runs import REGIMES, Cell, arm_arguments, build, rounded
from quality.regimes.text.corruption import token_losses
from quality.regimes.text.denoising import Denoising
from quality.regimes.text.models import logits_of
from quality.running import RESULTS
from quality.text.runs import load
from torch import Tensor
from tqdm.auto import tqdm

from nara_diffusion.dllm.masking import MaskedBatch

IMAGE_RATES = {"learning_rate": 1e-2, "core_learning_rate": 2.5e-3}
TEXT_RATES = {"learning_rate": 1e-2, "core_learning_rate": 1e-3}


class CheckLosses(NamedTuple):
    """The mean, and the losses (n,) and λ (n,) of samples."""

    loss: Tensor
    per_sample: Tensor
    noise_level: Tensor


def check_task(cell: Cell, seed: int) -> CheckTask:
    """The training of a cell's NaRA."""
    regime: Any = REGIMES[cell.regime]
    is_text = isinstance(regime, Denoising)
    options: dict[str, Any] = {"targets": cell.targets, "rank": cell.rank, "steps": cell.steps, "seed": seed}
    options |= TEXT_RATES if is_text else IMAGE_RATES
    args: Any = published(arm_arguments("nara", backbone=regime.backbone, **options))
    torch.manual_seed(seed)
    model = build("nara", args, regime.backbone).train()
    config, size = model.peft_config["default"], args.train_batch_size
    losses_with_level = None
    if is_text:
        add_cheap(model, config)
        losses_with_level = losses_of(
            replace(regime, corruption=replace(regime.corruption, corrupt=told_by(regime))), model, args
        )
    elif time_layers(model):
        add_cheap(model, config, time_layers(model))
    samples = max(CheckTask.samples, BINS * size)
    return CheckTask(model, config, args, *losses_of(regime, model, args), size, losses_with_level, samples=samples)


def told_by(regime: Denoising) -> Callable[..., MaskedBatch]:
    """The regime's corruption, of prompts that say λ."""
    digits = digit_tokens(load(regime.corruption.backbone)[1])
    return lambda rows, **options: with_level_token(regime.corruption.corrupt(rows, **options), digits)


def losses_of(regime: Any, model: Any, args: Any) -> tuple[Loss, Loss]:
    """Of `model` in training, and on held-out samples, of which a chunk of positions is a part of one bin of λ: of the
    next bin for the next chunk."""
    step, size = regime.loss(regime.backbone.controlled(model, None, args.seed), args), args.train_batch_size
    measured, part = list(regime.held_out()), _text_part if isinstance(regime, Denoising) else _image_part

    def loss(positions: Sequence[int]) -> CheckLosses:
        value = step(positions[0] // size)
        return CheckLosses(value, value[None], torch.zeros(1))

    def held_out(positions: Sequence[int]) -> CheckLosses:
        turn, index = divmod(positions[0] // size, BINS)
        return part(regime, measured[index], model, turn, size)

    return loss, held_out


def _image_part(regime: Any, batch: Any, unet: Any, turn: int, size: int) -> CheckLosses:
    count = max(1, len(batch.time_ids) // size)
    rows = batch.rows(slice(turn % count, None, count))
    losses = held_out_losses(unet, rows)
    return CheckLosses(losses.mean(), losses, rows.batch.timestep / LEVELS)


def _text_part(regime: Denoising, batch: MaskedBatch, model: Any, turn: int, size: int) -> CheckLosses:
    """The mean over the tokens that count; 0 where a sample has none."""
    count = max(1, len(batch.input_ids) // size)
    chosen: Any = {
        name: value[turn % count :: count] if isinstance(value, Tensor) else value
        for name, value in vars(replace(batch, places=None, opens=None)).items()
    }
    rows = MaskedBatch(**chosen)
    counted = regime.corruption.counted(rows)
    losses = (token_losses(logits_of(model, rows), rows) * counted).sum(1) / counted.sum(1).clamp(min=1)  # (n,)
    return CheckLosses(losses.mean(), losses, rows.noise_level)


def check_row(row: str, seed: int) -> dict[str, Any]:
    """Checks, and says what it found and was made with."""
    wall, core = time.perf_counter(), time.process_time()
    repeats, verdict = decide(check_task(ROWS[row], seed), progress=True)
    by_arm = {
        arm: {b: d._asdict() for b, d in of_baselines.items()} for arm, of_baselines in differences(repeats).items()
    }
    return {
        "row": row,
        "seed": seed,
        **{"verdict" if name == "answer" else name: value for name, value in verdict._asdict().items()},
        "repeats": len(repeats),
        **rounded({"differences": by_arm, "losses": mean_losses(repeats)}),
        "seconds": round(time.perf_counter() - wall, 1),
        "core_seconds": round(time.process_time() - core, 1),
        "date": results.now(),
        **provenance(),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Checks the rows of which there is no record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=tuple(ROWS), help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the check (default: 0)")
    parser.add_argument("--output", type=Path, default=RESULTS / "check.jsonl", help="default: %(default)s")
    args = parser.parse_args(argv)
    provenance()  # the commit at the start
    done = {(record["row"], record["seed"]) for record in results.read(args.output)}
    for row, seed in tqdm([(r, s) for s in args.seeds for r in args.rows if (r, s) not in done], unit="row"):
        results.append(args.output, [check_row(row, seed)])


if __name__ == "__main__":
    main()
