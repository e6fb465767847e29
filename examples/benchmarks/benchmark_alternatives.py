"""What the cheapest alternatives to NaRA reach, on the held-out sets of the regimes that compare it with LoRA.

    python examples/benchmarks/benchmark_alternatives.py               # what --output lacks, then the table
    python examples/benchmarks/benchmark_alternatives.py --seeds 20 21 22 --steps 200

eps_to_v, zero_snr, eps_to_flow
    read          LoRA, and NaRA on ε → v, trained on the loss of what the identity reads: the model keeps predicting ε
    identity      the untrained base, whose ε is read as what the regime asks for: v = (ε̂ − √(1 − ᾱ) x) / √ᾱ at the
                  same timestep; elsewhere at that of the base whose SNR is nearest (nara_diffusion's IdentityReading)
eps_to_v, zero_snr
    time layers   LoRA, of about as many parameters as NaRA has, and NaRA, on attention and on the layers that bring
                  the timestep to the ResNet blocks (time_embedding.linear_1, linear_2 and time_emb_proj)
blind_open
    NaRA-Knots    at about NaRA's number of parameters, without a token
    token         LoRA whose prompt says ⌊10 λ⌋ in place of the first digit of the code
    Bayes' rule   the best that a reader of λ can say; nothing is trained

Bayes' rule. A character x of an answer is one of K = 36, all alike, and is replaced, with probability λ, by one of the
n = 39 tokens of the noise, the true one among them. Of the token z that is seen there, a reader who is told λ knows

    p(x | z, λ) = ((1 − λ) [x = z] + λ / n) / (1 − λ + K λ / n)    if z is one of the K characters
                = 1 / K                                            if not: it was replaced then

and nothing else, since neither the prompt nor the rest of the answer says anything of x. The end of the answer is
always in the same place, so that p = 1 there. A reader who isn't told λ knows what the whole answer shows of it:

    p(x | z₁ … z_m) = Σ_λ p(x | z, λ) Π_i p(z_i | λ) / Σ_λ Π_i p(z_i | λ)            over a grid of λ, all alike before

with p(z | λ) = (1 − λ) / K + λ / n of a character, λ / n of another token, and 1 − λ + λ / n of an end that is kept.

Rates are those of the committed records, the best of two or three on another seed. All arms of a seed meet the same
data and noise. 200 steps take about half a minute of a core; set OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import shlex
import string
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

import torch
from quality import results
from quality.regimes.image_regimes import CONVERSIONS, ReadConversion
from quality.regimes.plan import cell_of, key_of, place_of
from quality.regimes.runs import MEAN_CORE, REGIMES, Cell, Run, record_of, rounded
from quality.regimes.text.corruption import REPLACED, noise_tokens
from quality.regimes.text.data import CHARACTERS, open_data
from quality.regimes.text.denoising import Denoising
from quality.regimes.text.models import load
from quality.report.data import NOTHING, table
from quality.running import RESULTS
from torch import Tensor
from tqdm.auto import tqdm

from nara_diffusion.dllm.masking import MaskedBatch

MEASURE, STEPS = "alternatives", 200
LEVELS = 200
"""Of the grid of λ of a reader who isn't told it."""
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


READ = {name: f"{name}_read" for name in CONVERSIONS}
TOLD_REGIME = {
    TOLD: Denoising(replace(REPLACED, corrupt=told), open_data),
    **{read: ReadConversion(name) for name, read in READ.items()},
}
"""Not of `REGIMES`, which the plan and nara-check's table go through."""


def bayes_losses(batch: MaskedBatch, is_told: bool = True) -> Tensor:
    """− log p (b, l) of the clean tokens by Bayes' rule; see the module's docstring."""
    if is_told:
        p = _character(batch, batch.noise_level.double()[:, None])
    else:
        levels = (torch.arange(LEVELS, dtype=torch.double) + 0.5) / LEVELS
        weights = torch.stack([_evidence(batch, level).sum(1) for level in levels]).softmax(0)  # (LEVELS, b)
        p = sum(weight[:, None] * _character(batch, level) for weight, level in zip(weights, levels, strict=True))
    return -p.log() * torch.isin(batch.targets, _token_ids(CHARACTERS))


def _character(batch: MaskedBatch, level: Tensor) -> Tensor:
    """p(x | z, λ) (b, l) of the clean character x, where there is one."""
    characters, noise = _token_ids(CHARACTERS), len(noise_tokens(load(REPLACED.backbone)[1]))
    same, known = batch.input_ids == batch.targets, torch.isin(batch.input_ids, characters)  # (b, l)
    p = ((1 - level) * same + level / noise) / (1 - level + len(characters) * level / noise)
    return torch.where(known, p, 1 / len(characters))


def _evidence(batch: MaskedBatch, level: Tensor) -> Tensor:
    """log p(z | λ) (b, l) of the answer's tokens, 0 elsewhere."""
    characters, noise = _token_ids(CHARACTERS), len(noise_tokens(load(REPLACED.backbone)[1]))
    known = torch.isin(batch.input_ids, characters)
    of_character = level / noise + (1 - level) / len(characters) * known
    of_end = level / noise + (1 - level) * (batch.input_ids == batch.targets)
    return torch.where(torch.isin(batch.targets, characters), of_character, of_end).log() * batch.answer


def _token_ids(characters: str) -> Tensor:
    tokenizer = load(REPLACED.backbone)[1]
    return torch.tensor(tokenizer(list(characters), add_special_tokens=False)["input_ids"])[:, 0]


def bayes(is_told: bool) -> list[float]:
    """The loss of each bin of λ."""
    return [bayes_losses(batch, is_told)[batch.answer].mean().item() for batch in REGIMES[TEXT].held_out()]


def identity(regime: str) -> list[float]:
    """The loss of each bin of λ, of the base whose ε is read as what `regime` asks for."""
    read = ReadConversion(regime, REGIMES[regime].load)
    return read.figures(read.load().pipe.unet)["losses"]


@dataclass(frozen=True)
class Trained:
    """Attributes:
    regime, title: in the table.
    cell, arm: as the regimes train them.
    """

    regime: str
    title: str
    cell: Cell
    arm: str

    def run(self, seed: int) -> Run:
        """With the rates of the committed records."""
        known = replace(self.cell, steps=STEPS)
        found = (r for r in results.read(RESULTS / "alternatives.jsonl") if r["stage"] == MEASURE and r["rates"])
        rates = next(r["rates"] for r in found if cell_of(r) == known and r["arm"] == self.arm)
        return Run(self.cell, self.arm, seed, rates)


def trained(steps: int) -> list[Trained]:
    """What is trained, in the table's order."""
    rows = [(name, "LoRA, read by the identity, r 4", READ[name], "attention", 4, "lora") for name in CONVERSIONS]
    rows += [
        ("eps_to_v", "NaRA, read, r 4", READ["eps_to_v"], "attention", 4, "nara"),
        ("eps_to_v", "LoRA, all layers, read, r 4", READ["eps_to_v"], "all", 4, "lora"),
    ]
    for name in ("eps_to_v", "zero_snr"):
        rows += [
            (name, "LoRA, r 4", name, "attention", 4, "lora"),
            (name, "NaRA, r 4", name, "attention", 4, "nara"),
            (name, "LoRA, time layers too, r 12", name, "attention_time", 12, "lora"),
            (name, "NaRA, time layers too, r 4", name, "attention_time", 4, "nara"),
        ]
    rows += [
        (TEXT, "LoRA, r 4", TEXT, "attention", 4, "lora"),
        (TEXT, "NaRA, r 4", TEXT, "attention", 4, "nara"),
        (TEXT, "LoRA, λ as a token, r 4", TOLD, "attention", 4, "lora"),
        (TEXT, "LoRA, λ as a token, r 43", TOLD, "attention", 43, "lora"),
        (TEXT, "NaRA-Knots, r 28", TEXT, "attention", 28, "nara_knots"),
        (TEXT, "NaRA, all layers, r 4", TEXT, "all", 4, "nara"),
        (TEXT, "LoRA, all layers, λ as a token, r 22", TOLD, "all", 22, "lora"),
    ]
    return [Trained(regime, title, Cell(own, on, rank, steps), arm) for regime, title, own, on, rank, arm in rows]


UNTRAINED: dict[tuple[str, str], Callable[[], list[float]]] = {
    **{(regime, "the base, read by the identity"): partial(identity, regime) for regime in CONVERSIONS},
    (TEXT, "Bayes' rule, told λ"): partial(bayes, True),
    (TEXT, "Bayes' rule, not told λ"): partial(bayes, False),
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
    """Makes the runs that `output` lacks, a line each, seed after seed."""
    for regime, title in UNTRAINED:
        if not any(record["arm"] == title and record["regime"] == regime for record in results.read(output)):
            results.append(output, [untrained_record(regime, title)])
    done = {key_of(record) for record in results.read(output) if record["rates"]}
    runs = [arm.run(seed) for seed in seeds for arm in arms]
    for run in tqdm([run for run in runs if key_of(run.named) not in done], unit="run"):
        record = record_of(run, MEASURE)
        results.append(output, [{name: value for name, value in record.items() if name not in DROPPED}])


def report(records: Sequence[Mapping[str, Any]], steps: int = STEPS) -> str:
    """A row an arm: parameters, rates, the score of each seed."""
    measured = [record for record in records if record["stage"] == MEASURE]
    seeds = sorted({record["seed"] for record in measured if record["rates"]})
    rows = []
    for regime in (*CONVERSIONS, TEXT):
        for record in measured:
            if record["regime"] == regime and not record["rates"]:
                rows.append([regime, record["arm"], "0", NOTHING, *[_figure(record)] * len(seeds)])
        for arm in trained(steps):
            place = (*astuple(arm.cell), arm.arm)
            own = {each["seed"]: each for each in measured if each["rates"] and place_of(each)[:-1] == place}
            if arm.regime == regime and own:
                one = next(iter(own.values()))
                rate = " / ".join(f"{value:g}" for value in one["rates"].values())
                scores = [_figure(own.get(seed)) for seed in seeds]
                rows.append([regime, arm.title, str(one["trainable_parameters"]), rate, *scores])
    return table(["regime", "method", "parameters", "rate", *(f"seed {seed}" for seed in seeds)], rows)


def _figure(record: Mapping[str, Any] | None) -> str:
    return NOTHING if record is None or record["score"] is None else f"{record['score']:.3f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Measures what the records lack, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[20, 21], help="default: 20 21")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each training (default: %(default)s)")
    where = "the records, added to (default: %(default)s)"
    parser.add_argument("--output", type=Path, default=RESULTS / "alternatives.jsonl", help=where)
    args = parser.parse_args(argv)
    arms = trained(args.steps)
    results.provenance()  # the commit at the start
    with patch.dict(REGIMES, TOLD_REGIME):
        measure(args.output, arms, args.seeds)
    print(report(results.read(args.output), args.steps))


if __name__ == "__main__":
    main()
