"""What the cheapest alternatives to NaRA reach, on the held-out sets of the regimes that compare it with LoRA.

    python examples/benchmarks/benchmark_alternatives.py               # what --output lacks, then the table
    python examples/benchmarks/benchmark_alternatives.py --seeds 20 21 22 --steps 200

eps_to_v, zero_snr, eps_to_flow
    identity      the untrained base, whose ε is read as what the regime asks for: v = (ε̂ − √(1 − ᾱ) x) / √ᾱ at the
                  same timestep; elsewhere at that of the base whose SNR is nearest (nara_diffusion's IdentityReading)
eps_to_v, zero_snr
    time layers   LoRA, of about as many parameters as NaRA has, and NaRA, on attention and on the layers that bring
                  the timestep to the ResNet blocks (time_embedding.linear_1, linear_2 and time_emb_proj)
blind_open
    token         LoRA whose prompt says ⌊10 λ⌋ in place of the first digit of the code
    Bayes' rule   the best that a reader of λ can say; nothing is trained

Bayes' rule. A character x of an answer is one of K = 36, all alike, and is replaced, with probability λ, by one of the
n = 39 tokens of the noise, the true one among them. Of the token z that is seen there, a reader who is told λ knows

    p(x | z, λ) = ((1 − λ) [x = z] + λ / n) / (1 − λ + K λ / n)    if z is one of the K characters
                = 1 / K                                            if not: it was replaced then

and nothing else, since neither the prompt nor the rest of the answer says anything of x. The end of the answer is
always in the same place, so that p = 1 there.

NaRA and LoRA on attention have the rates that the regimes chose on their own development seeds. The other arms have the
better of two rates on seed 10, which nothing else uses; those runs are records too, of the stage "tune". All arms of a
seed meet the same data and noise. 200 steps take about half a minute of a core; set OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import shlex
import string
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

import torch
from quality import results
from quality.images.held_out import predicted
from quality.regimes.images.objectives import CONVERSIONS, build_conversion
from quality.regimes.methods import MEAN_CORE
from quality.regimes.plan import PLAN
from quality.regimes.rates import chosen_rates, key_of
from quality.regimes.runs import REGIMES, Cell, Run, record_of, rounded
from quality.regimes.text.corruption import REPLACED, noise_tokens
from quality.regimes.text.data import CHARACTERS, open_data
from quality.regimes.text.denoising import Denoising
from quality.regimes.text.models import load
from quality.report.markdown import NOTHING, table
from quality.suites import Settings
from quality.trials import rates, with_core
from torch import Tensor
from tqdm.auto import tqdm

from nara_diffusion.dllm.masking import MaskedBatch
from nara_diffusion.dreambooth.objectives import IdentityReading, squared_errors

RESULTS = Path(__file__).parent / "results"
TUNE, MEASURE = "tune", "alternatives"
TUNING_SEED, STEPS = 10, 200
DROPPED = (MEAN_CORE, "own_rank")
"""Of a run's record: an ablation, and what `rank` says too."""
TEXT, TOLD = "blind_open", "blind_open_told"


def told(rows: dict[str, Tensor], **options: Any) -> MaskedBatch:
    """As `REPLACED` corrupts `rows`, with ⌊10 λ⌋ in place of the first digit of each prompt."""
    batch = REPLACED.corrupt(rows, **options)
    digits = _token_ids(string.digits)  # (10,)
    first = (torch.isin(batch.input_ids, digits) & ~batch.answer).int().argmax(1)  # (b,)
    input_ids = batch.input_ids.clone()
    input_ids[torch.arange(len(first)), first] = digits[(10 * batch.noise_level).long().clamp(max=9)]
    return replace(batch, input_ids=input_ids)


TOLD_REGIME = {TOLD: Denoising(replace(REPLACED, corrupt=told), open_data)}
"""Not of `REGIMES`, which the plan and nara-check's table go through."""


def bayes_losses(batch: MaskedBatch) -> Tensor:
    """− log p (b, l) of the clean tokens by Bayes' rule; see the module's docstring."""
    characters, noise = _token_ids(CHARACTERS), len(noise_tokens(load(REPLACED.backbone)[1]))
    level = batch.noise_level.double()[:, None]  # (b, 1)
    same, known = batch.input_ids == batch.targets, torch.isin(batch.input_ids, characters)  # (b, l)
    p = ((1 - level) * same + level / noise) / (1 - level + len(characters) * level / noise)
    losses = -torch.where(known, p, 1 / len(characters)).log()
    return losses * torch.isin(batch.targets, characters)


def _token_ids(characters: str) -> Tensor:
    tokenizer = load(REPLACED.backbone)[1]
    return torch.tensor(tokenizer(list(characters), add_special_tokens=False)["input_ids"])[:, 0]


def bayes() -> list[float]:
    """The loss of each bin of λ."""
    return [bayes_losses(batch)[batch.answer].mean().item() for batch in REGIMES[TEXT].held_out()]


def identity(regime: str) -> list[float]:
    """The loss of each bin of λ, of the base whose ε is read as what `regime` asks for."""
    data = REGIMES[regime].load()
    objective = build_conversion(regime, data.pipe.scheduler)
    reading, losses = IdentityReading(data.pipe.scheduler, objective), []
    for clean in data.held_out:
        held_out = clean.corrupted(objective)
        shown = held_out.batch.model_input
        sample, timestep = reading.base_inputs(shown, clean.indices)
        seen = replace(held_out, batch=replace(held_out.batch, model_input=sample, timestep=timestep))
        said = reading.prediction(shown, predicted(data.pipe.unet, seen), clean.indices)
        losses.append(squared_errors(said, held_out.batch).mean().item())
    return losses


@dataclass(frozen=True)
class Trained:
    """Attributes:
    regime, title: in the table.
    cell, arm: as the regimes train them.
    trials: the rates that are tried on `TUNING_SEED`; those that the regimes chose if there are none.
    """

    regime: str
    title: str
    cell: Cell
    arm: str
    trials: Sequence[Settings] = ()

    def rates(self, records: Sequence[Mapping[str, Any]]) -> Settings:
        """Of its runs, by the tuning runs of `records`, or by those of the regimes."""
        if not self.trials:
            planned = next(p for p in PLAN if p.cell == replace(self.cell, steps=STEPS) and not p.label)
            return chosen_rates(results.read(RESULTS / "regimes.jsonl"), planned, self.arm)
        found = keys(records)
        scores = [found[key_of(run.named)]["score"] for run in self.tuning_runs()]
        return self.trials[scores.index(min(score for score in scores if score is not None))]

    def tuning_runs(self) -> list[Run]:
        return [Run(self.cell, self.arm, TUNING_SEED, trial) for trial in self.trials]


def trained(steps: int) -> list[Trained]:
    """What is trained, in the table's order."""
    found = []
    for regime in ("eps_to_v", "zero_snr"):
        plain, time_layers = Cell(regime, "attention", 4, steps), Cell(regime, "attention_time", 4, steps)
        found += [
            Trained(regime, "LoRA, r 4", plain, "lora"),
            Trained(regime, "NaRA, r 4", plain, "nara"),
            Trained(regime, "LoRA, time layers too, r 12", replace(time_layers, rank=12), "lora", rates(5e-3, 1e-2)),
            Trained(regime, "NaRA, time layers too, r 4", time_layers, "nara", with_core((5e-3, 1e-3), (1e-2, 1e-3))),
        ]
    plain, token = Cell(TEXT, "attention", 4, steps), Cell(TOLD, "attention", 4, steps)
    return [
        *found,
        Trained(TEXT, "LoRA, r 4", plain, "lora"),
        Trained(TEXT, "NaRA, r 4", plain, "nara"),
        Trained(TEXT, "LoRA, λ as a token, r 4", token, "lora", rates(2e-2, 4e-2)),
        Trained(TEXT, "LoRA, λ as a token, r 43", replace(token, rank=43), "lora", rates(1e-2, 2e-2)),
    ]


UNTRAINED: dict[tuple[str, str], Callable[[], list[float]]] = {
    **{(regime, "the base, read by the identity"): partial(identity, regime) for regime in CONVERSIONS},
    (TEXT, "Bayes' rule, told λ"): bayes,
}
"""{(regime, title): the loss of each bin}, the same for all seeds."""


def untrained_record(regime: str, title: str) -> dict[str, Any]:
    """What `UNTRAINED` says, and what it was made with."""
    started = time.perf_counter()
    losses = UNTRAINED[regime, title]()
    figures = rounded({"losses": losses, "score": fmean(losses), "seconds": time.perf_counter() - started})
    made_with = {"date": results.now(), "command": shlex.join(["python", *sys.argv]), **results.provenance()}
    return {"stage": MEASURE, "regime": regime, "arm": title, "seed": None, "rates": {}, **figures, **made_with}


def measure(output: Path, arms: Sequence[Trained], seeds: Sequence[int]) -> None:
    """Makes the runs that `output` lacks, a line each: first those that choose rates, then seed after seed."""
    for regime, title in UNTRAINED:
        if not any(record["arm"] == title and record["regime"] == regime for record in results.read(output)):
            results.append(output, [untrained_record(regime, title)])
    make(output, TUNE, [run for arm in arms for run in arm.tuning_runs()])
    records = results.read(output)
    make(output, MEASURE, [Run(arm.cell, arm.arm, seed, arm.rates(records)) for seed in seeds for arm in arms])


def make(output: Path, stage: str, runs: Sequence[Run]) -> None:
    """Those of `runs` that `output` lacks."""
    done = keys(results.read(output))
    for run in tqdm([run for run in runs if key_of(run.named) not in done], desc=stage, unit="run"):
        record = record_of(run, stage)
        results.append(output, [{name: value for name, value in record.items() if name not in DROPPED}])


def keys(records: Sequence[Mapping[str, Any]]) -> dict[tuple[Any, ...], Mapping[str, Any]]:
    """{key: record} of what was trained."""
    return {key_of(record): record for record in records if record["rates"]}


def report(records: Sequence[Mapping[str, Any]], arms: Sequence[Trained], seeds: Sequence[int]) -> str:
    """A row an arm: parameters, rates, the score of each seed."""
    found, rows = keys(records), []
    for regime in dict.fromkeys((*(regime for regime, _ in UNTRAINED), *(arm.regime for arm in arms))):
        for record in records:
            if record["regime"] == regime and not record["rates"]:
                rows.append([regime, record["arm"], "0", NOTHING, *[f"{record['score']:.3f}"] * len(seeds)])
        for arm in arms:
            if arm.regime == regime:
                each = [found[key_of(Run(arm.cell, arm.arm, seed, arm.rates(records)).named)] for seed in seeds]
                rate = " / ".join(f"{value:g}" for value in arm.rates(records).values())
                scores = [NOTHING if r["score"] is None else f"{r['score']:.3f}" for r in each]
                rows.append([regime, arm.title, str(each[0]["trainable_parameters"]), rate, *scores])
    return table(["regime", "method", "parameters", "rate", *(f"seed {seed}" for seed in seeds)], rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures what the records lack, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[20, 21], help="default: 20 21")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each training (default: %(default)s)")
    where = "the records, added to (default: %(default)s)"
    parser.add_argument("--output", type=Path, default=RESULTS / "alternatives.jsonl", help=where)
    args = parser.parse_args(argv)
    if TUNING_SEED in args.seeds:
        parser.error(f"--seeds has {TUNING_SEED}, on which rates are chosen: leave it out")
    arms = trained(args.steps)
    results.provenance()  # the commit at the start
    with patch.dict(REGIMES, TOLD_REGIME):
        measure(args.output, arms, args.seeds)
    print(report(results.read(args.output), arms, args.seeds))


if __name__ == "__main__":
    main()
