"""The tables of block diffusion, from its records: trials of rates, losses, bins of λ, exact match, Bayes' rule."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from mean_interval import Interval, interval

from quality.blocks.bayes import CANVASES, bayes_losses, open_canvases
from quality.report.data import NOTHING, Record, change, table
from quality.results import read

RECORDS = "blocks.jsonl"
BASE, SHORT, LONG = "gemma-tiny", 300, 1000
REFERENCE, BEST = "LoRA", "LoRA and b(λ)"
TWINS = " on both twins"
ONE_PASS = ", no second pass"
LONGER = ("64", "256")
EXACT_STEPS = ("4", "8", "16")
DIGITS = 4
Cell = dict[str, dict[int, Record]]
"""arm → seed → record."""


def cell(records: Iterable[Record], *, stage: str = "confirm", base: str = BASE, task: str, steps: int) -> Cell:
    """The records of one base, task and length that didn't diverge."""
    fields = {"stage": stage, "base": base, "task": task, "steps": steps}.items()
    by_arm: Cell = defaultdict(dict)
    for record in records:
        if fields <= record.items() and record["score"] is not None:
            by_arm[record["arm"]][record["seed"]] = record
    return by_arm


def paired(found: Cell, one: str, other: str, figure: str = "score") -> Interval | None:
    """The difference of two arms over the seeds that both have; None if these are fewer than two."""
    seeds = sorted(found.get(one, {}).keys() & found.get(other, {}).keys())
    if len(seeds) < 2 or one == other:
        return None
    return interval([_value(found[one][seed], figure) - _value(found[other][seed], figure) for seed in seeds])


def _value(record: Record, figure: str) -> float:
    value = _exact(record) if figure == "exact" else record[figure]
    return value if isinstance(value, float) else fmean(value)


def _means(own: Mapping[int, Record], *figures: str) -> list[str]:
    return [f"{fmean(_value(record, figure) for record in own.values()):.{DIGITS}f}" for figure in figures]


def shared(found: Cell, arms: Iterable[str]) -> Cell:
    """Those of `arms`, with the seeds that all of them have."""
    chosen = {arm: found[arm] for arm in arms}
    seeds = sorted(set.intersection(*(set(records) for records in chosen.values()))) if chosen else []
    return {arm: {seed: records[seed] for seed in seeds} for arm, records in chosen.items()}


def losses_table(found: Cell) -> str:
    """A row an arm: its losses, and the paired differences of their means."""
    header = ["arm", "parameters", "seeds", "first pass", "second pass", "mean", f"− {REFERENCE}", f"− {BEST}"]
    rows = []
    for arm, by_seed in found.items():
        size = next(iter(by_seed.values()))["trainable_parameters"]
        differences = [change(paired(found, arm, other), DIGITS) for other in (REFERENCE, BEST)]
        rows.append([arm, str(size), str(len(by_seed)), *_means(by_seed, "first", "second", "score"), *differences])
    return table(header, rows)


def bins_table(found: Cell) -> str:
    """A row an arm: the mean loss of both passes in each bin of λ, of the reference, and differences of the others."""
    rows = []
    for arm, by_seed in found.items():
        shared = [seed for seed in by_seed if seed in found[REFERENCE]]
        bins = [
            fmean(
                _of_bin(by_seed[seed], i) - (arm != REFERENCE) * _of_bin(found[REFERENCE][seed], i) for seed in shared
            )
            for i in range(10)
        ]
        sign = "" if arm == REFERENCE else "+"
        rows.append([arm if not sign else f"{arm} − {REFERENCE}", *(f"{x:{sign}.3f}".replace("-", "−") for x in bins)])
    return table(["λ", *(f"{(i + 0.5) / 10:.2f}" for i in range(10))], rows)


def _of_bin(record: Record, index: int) -> float:
    return (record["first"][index] + record["second"][index]) / 2


def exact_table(found: Cell) -> str:
    """A row an arm: exact match at each number of steps, its mean, at the true λ too, and the loss."""
    rows = []
    for arm, by_seed in found.items():
        shares = [
            f"{100 * fmean(record['exact'][steps] for record in by_seed.values()):.1f} %" for steps in EXACT_STEPS
        ]
        differences = (change(paired(found, arm, REFERENCE, figure), DIGITS) for figure in ("exact", "score"))
        exact, loss = differences
        rows.append([arm, str(len(by_seed)), *shares, _at_true_level(by_seed), exact, *_means(by_seed, "score"), loss])
    header = ["arm", "seeds", *(f"{steps} steps" for steps in EXACT_STEPS), "true λ", f"exact − {REFERENCE}"]
    return table([*header, "loss", f"loss − {REFERENCE}"], rows)


def _exact(record: Record, is_true: bool = False) -> float:
    """The mean of a record's exact match over the numbers of steps."""
    return fmean(record["exact"][f"{steps}, true λ" if is_true else steps] for steps in EXACT_STEPS)


def _at_true_level(own: Mapping[int, Record]) -> str:
    """The mean exact match at the true λ of the runs that have it."""
    shares = [_exact(record, True) for record in own.values() if len(record["exact"]) > len(EXACT_STEPS)]
    return f"{100 * fmean(shares):.1f} %" if shares else NOTHING


def trials_table(records: Sequence[Record]) -> str:
    """A row an arm and task: what was tried on the development seed."""
    tried: dict[tuple[str, str, int], dict[str, float | None]] = defaultdict(dict)
    for record in records:
        if record["stage"] == "dev" and record["steps"] == SHORT:
            rates = " / ".join(f"{rate:g}" for rate in record["rates"].values())
            tried[record["task"], record["arm"], record["trainable_parameters"]][rates] = record["score"]
    rows = []
    for (task, arm, size), scores in tried.items():
        best = min((score for score in scores.values() if score is not None), default=None)
        texts = (f"{rates or 'untrained'}: {_marked(score, best)}" for rates, score in scores.items())
        rows.append([task, arm, str(size), "; ".join(texts)])
    return table(["task", "arm", "parameters", "trials (rate, or rate / core's rate: loss)"], rows)


def _marked(score: float | None, best: float | None) -> str:
    if score is None:
        return "diverged"
    return f"**{score:.{DIGITS}f}**" if score == best else f"{score:.{DIGITS}f}"


def bayes_table() -> str:
    """A row a canvas of random characters: nats a place of a reader who is told λ, and of one who isn't."""
    rows = []
    for sizes in CANVASES:
        seen = open_canvases(*sizes)
        with_level, without_level = (bayes_losses(seen, is_told).mean().item() for is_told in (True, False))
        rows.append(
            [*map(str, sizes), f"{with_level:.3f}", f"{without_level:.3f}", f"{without_level - with_level:.3f}"]
        )
    return table(["positions", "characters", "vocabulary", "told λ", "not told", "difference"], rows)


def sections(records: Sequence[Record]) -> str:
    """Everything that `records` say."""
    parts = [trials_table(records)]
    for key in dict.fromkeys((r["base"], r["task"], r["steps"]) for r in records if r["stage"] == "confirm"):
        by_arm = cell(records, base=key[0], task=key[1], steps=key[2])
        parts += [f"### {key[0]}, {key[1]}, {key[2]} steps", losses_table(by_arm)]
        parts += [bins_table(by_arm)] if REFERENCE in by_arm else []
        parts += [exact_table(by_arm)] if next(iter(next(iter(by_arm.values())).values()))["exact"] else []
    return "\n\n".join(parts)


def both_lengths_table(records: Sequence[Record]) -> str:
    """A row an arm that ran on all seeds: its loss on `open`, short and long, and differences to the reference."""
    short, long = (cell(records, task="open", steps=steps) for steps in (SHORT, LONG))
    lengths = {SHORT: short, LONG: shared(long, [arm for arm in long if arm in short])}
    header = ["arm", "parameters"]
    for steps, by_arm in lengths.items():
        header += [f"{steps} steps ({len(by_arm[REFERENCE])} seeds)", f"− {REFERENCE}"]
    rows = []
    seeds = lengths[SHORT][REFERENCE].keys()
    for arm, by_seed in lengths[SHORT].items():
        if arm.endswith((TWINS, ONE_PASS)) or not seeds <= by_seed.keys():
            continue
        row = [arm, str(next(iter(by_seed.values()))["trainable_parameters"])]
        for by_arm in lengths.values():
            row += _means(by_arm[arm], "score") if by_arm.get(arm) else [NOTHING]
            row.append(change(paired(by_arm, arm, REFERENCE), DIGITS))
        rows.append(row)
    return table(header, rows)


def page_table(folder: Path) -> str:
    """The table of examples/benchmarks/results/blocks.md, from the records in `folder`."""
    return both_lengths_table(read(folder / RECORDS))


def twins_table(folder: Path) -> str:
    """A row an arm: its short loss on `open` on both twins, over the seeds that all of these arms have."""
    every = cell(read(folder / RECORDS), task="open", steps=SHORT)
    by_arm = shared(every, [arm for arm in every if arm.endswith(TWINS)])
    rows = []
    for arm, by_seed in by_arm.items():
        size = next(iter(by_seed.values()))["trainable_parameters"]
        rows.append([arm, str(size), *_means(by_seed, "score"), change(paired(by_arm, arm, REFERENCE + TWINS), DIGITS)])
    return table(["arm", "parameters", f"loss ({_seeds(by_arm)} seeds)", f"− {REFERENCE}{TWINS}"], rows)


def one_pass_table(folder: Path) -> str:
    """A row an arm that had no second pass in training: its short losses on `open` in both passes."""
    every = cell(read(folder / RECORDS), task="open", steps=SHORT)
    by_arm = shared(every, [arm for arm in every if arm.endswith(ONE_PASS)])
    rows = []
    for arm, by_seed in by_arm.items():
        differences = [change(paired(by_arm, arm, REFERENCE + ONE_PASS, name), DIGITS) for name in ("first", "second")]
        first, second = _means(by_seed, "first", "second")
        rows.append([arm.removesuffix(ONE_PASS), first, differences[0], second, differences[1]])
    return table([f"{_seeds(by_arm)} seeds", "first pass", f"− {REFERENCE}", "second pass", f"− {REFERENCE}"], rows)


def longer_table(folder: Path) -> str:
    """A row a canvas: the losses of the arms on `open`, and differences to the reference."""
    records = read(folder / RECORDS)
    arms = (REFERENCE, BEST, "NaRA")
    header = ["positions", "seeds", REFERENCE, *(f"{arm} − {REFERENCE}" for arm in arms[1:])]
    rows = []
    for positions in LONGER:
        by_arm = shared(cell(records, base=f"gemma-{positions}", task="open", steps=200), arms)
        differences = [change(paired(by_arm, arm, REFERENCE), DIGITS) for arm in arms[1:]]
        rows.append([positions, _seeds(by_arm), *_means(by_arm[REFERENCE], "score"), *differences])
    return table(header, rows)


def _seeds(found: Cell) -> str:
    return str(len(next(iter(found.values()))))


def answers_table(folder: Path, task: str) -> str:
    """The exact match of a task after long training."""
    every = cell(read(folder / RECORDS), task=task, steps=LONG)
    return exact_table(shared(every, every))


def asked_row(folder: Path, arms: Iterable[str]) -> list[str]:
    """The row of RESULTS.md: the simplest that does as well, each of `arms`, and NaRA − LoRA."""
    by_arm = cell(read(folder / RECORDS), task="open", steps=SHORT)
    figures = []
    seeds = by_arm[REFERENCE].keys()
    for arm in (BEST, *arms):
        by_seed = by_arm[arm] if seeds <= by_arm.get(arm, {}).keys() else {}
        size = next(iter(by_seed.values()))["trainable_parameters"] / 1000 if by_seed else 0
        figures.append(f"{fmean(r['score'] for r in by_seed.values()):.3f} ({size:.0f} k)" if by_seed else NOTHING)
    return [*figures, change(paired(by_arm, "NaRA", REFERENCE), 3)]
