"""docs/results/regimes_plan.md: what was decided before the confirmation seeds ran, and that it still holds.

Between two marks the file has tables that `--write_plan` writes from the plan in code and the development records. A
regime is confirmed only while they agree with both, the file is committed, and its line "Registered:" names the regime.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from quality.regimes.plan import DEV_SEEDS, PLAN, RATES_OF, Planned
from quality.regimes.rates import Record, chosen_rates, is_at_an_end, trial_scores
from quality.suites import Settings
from quality.tuning import Untuned

ROOT = Path(__file__).parents[4]
PLAN_FILE = ROOT / "docs" / "results" / "regimes_plan.md"
FIRST, LAST = "<!-- tables from here, by benchmark_regimes.py --write_plan -->", "<!-- tables to here -->"

AT_AN_END = "an end of the grid"


def check_registered(names: Sequence[str], records: Sequence[Record], path: Path = PLAN_FILE) -> None:
    """Refuses to confirm what wasn't decided before.

    Raises:
        ValueError: a cell that the file doesn't name as registered, tables that differ from the plan in code or
            from the development records, or changes that aren't committed.
    """
    text = path.read_text(encoding="utf-8")
    missing = sorted(set(names) - set(registered(text)))
    if missing:
        raise ValueError(
            f"{path.name} doesn't name {', '.join(missing)} as registered: finish its development, --write_plan, add "
            'it to the line "Registered:" and commit the file, before its confirmation seeds run.'
        )
    planned = [each for each in PLAN if each.name in names]
    if not all(_cell_table(each, records) in tables_in(text) for each in planned):
        raise ValueError(
            f"the tables of {path.name} differ from the plan in code or the development records: --write_plan, read "
            "what changed, and commit it."
        )
    ends = [each.name for each in planned if AT_AN_END in _cell_table(each, records)]
    if ends:
        raise ValueError(
            f"in {', '.join(dict.fromkeys(ends))} a chosen rate is an end of its grid: give its cell in "
            "quality/regimes/plan.py the next rate as `further`, and run --stages dev once more."
        )
    if subprocess.run(["git", "diff", "--quiet", "HEAD", "--", path], cwd=path.parent, capture_output=True).returncode:
        raise ValueError(f"{path.name} has changes that aren't committed: a plan counts from its commit on.")


def registered(text: str) -> list[str]:
    """The cells that the file's line "Registered:" names."""
    lines = re.findall(r"^Registered:(.*)$", text, re.MULTILINE)
    names = re.findall(r"[a-z_]+", lines[0].partition("(")[0]) if len(lines) == 1 else []
    return [name for name in names if name != "none"]


def tables_in(text: str) -> str:
    """What stands between the two marks."""
    return text.partition(FIRST)[2].partition(LAST)[0].strip()


def write_plan(records: Sequence[Record], path: Path = PLAN_FILE) -> None:
    """Puts the tables of today between the marks of `path`."""
    before, first, rest = path.read_text(encoding="utf-8").partition(FIRST)
    _, last, after = rest.partition(LAST)
    if not (first and last):
        raise ValueError(f"{path} lacks the marks {FIRST!r} and {LAST!r} that its tables stand between.")
    path.write_text(f"{before}{FIRST}\n\n{plan_tables(records)}\n\n{LAST}{after}", encoding="utf-8")


def plan_tables(records: Sequence[Record]) -> str:
    """For each cell of the plan its arms, the score of each trial, and the rates that are chosen."""
    return "\n\n".join(_cell_table(planned, records) for planned in PLAN)


def _cell_table(planned: Planned, records: Sequence[Record]) -> str:
    cell = planned.cell
    seeds = ", ".join(map(str, planned.dev_seeds))
    assert set(planned.dev_seeds) <= set(DEV_SEEDS)
    title = f"**{planned.name}**, targets {cell.targets}, rank {cell.rank}, {cell.steps} steps; development on {seeds}"
    rows = ["| method | trials (rate, or rate / core's rate: mean score) | chosen |", "|---|---|---|"]
    rows += [f"| {arm} | {_trials(planned, arm, records)} | {_choice(planned, arm, records)} |" for arm in planned.arms]
    return "\n".join([title, "", *rows])


def _trials(planned: Planned, arm: str, records: Sequence[Record]) -> str:
    if arm in RATES_OF:
        return f"as {RATES_OF[arm]}"
    if not planned.trials(arm):
        return "none"
    scores = trial_scores(records, planned, arm)
    return "; ".join(f"{_text(trial)}: {_mean(own)}" for trial, own in zip(planned.trials(arm), scores, strict=True))


def _mean(scores: Sequence[float | None]) -> str:
    known = [score for score in scores if score is not None]
    return "open" if len(known) < len(scores) else f"{sum(known) / len(known):.4f}"


def _choice(planned: Planned, arm: str, records: Sequence[Record]) -> str:
    try:
        rates = chosen_rates(records, planned, arm)
    except Untuned:
        return "open"
    return f"{_text(rates)}, {AT_AN_END}" if is_at_an_end(planned, arm, rates) else _text(rates)


def _text(rates: Settings) -> str:
    return "none" if not rates else " / ".join(f"{value:g}" for value in rates.values())
