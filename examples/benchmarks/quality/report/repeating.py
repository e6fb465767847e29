"""The commands that make the results and the report once more, as the records say what was run."""

from __future__ import annotations

from collections.abc import Sequence

from quality.jobs import SEEDS, STAGES
from quality.report.data import Record, distinct, select
from quality.suites import MUST, RANKS, TUNE_DOMAINS
from quality.variants import VARIANTS

FOLDER = "outputs/quality"


def repeat(records: Sequence[Record]) -> list[str]:
    """The commands, one for each backbone, and the one that makes the report."""
    lines, folders = [], []
    for suite in distinct(records, "suite"):
        for backbone in distinct(select(records, suite=suite), "backbone"):
            own = select(records, suite=suite, backbone=backbone)
            rank = _other_rank(own, suite)
            folders.append(FOLDER if rank is None else f"{FOLDER}/rank{rank}")
            words = ["python examples/benchmarks/benchmark_quality.py --modality", suite, "--backbones", backbone]
            if rank is not None:
                words += ["--set", f"rank={rank}", "--output", f"{folders[-1]}/{suite}.jsonl"]
            lines += [" ".join([*words, *options]) for options in (_usual(own, suite), _more_seeds(own)) if options]
    files = [f"{folder}/*.jsonl" for folder in dict.fromkeys(folders)]
    output = folders[0] if len(files) == 1 else FOLDER
    lines.append(
        f"python examples/benchmarks/report_quality.py --results {' '.join(files)} --output {output}/RESULTS.md"
    )
    return [
        "## How to repeat it",
        "Each line of the results holds the settings, versions and commit of a run. The first commands run what is "
        f"missing and append it to files in {FOLDER}, so they go on where they were stopped; the last makes this "
        "page's tables and pictures, from results alone. `--help` tells how to run a part.",
        "```bash\n" + "\n".join(lines) + "\n```",
    ]


def _other_rank(records: Sequence[Record], suite: str) -> int | None:
    """A rank that isn't the suite's, which the command line has to name: tuning is of one rank, and so is a file."""
    ranks = [rank for rank in distinct(select(records, stage="main"), "rank") if rank not in (None, RANKS.get(suite))]
    return ranks[0] if ranks else None


def _usual(records: Sequence[Record], suite: str) -> list[str]:
    """All stages; variants and domains for tuning where they are others than the command's own."""
    stages, methods = distinct(records, "stage"), distinct(records, "method")
    tried = distinct(select(records, stage="tune"), "domain")
    options = ["--stages", *(stage for stage in STAGES if stage in stages)]
    if variants := [name for name in VARIANTS if name in methods]:
        options += ["--methods", *MUST, *variants]
    if tried and set(tried) != set(TUNE_DOMAINS.get(suite, ())):
        options += ["--tune_domains", *tried]
    return options


def _more_seeds(records: Sequence[Record]) -> list[str]:
    """Of the methods that have more seeds than the command's own; nothing if there are none."""
    further = [record for record in select(records, stage="main") if record["seed"] not in SEEDS]
    seeds = map(str, sorted(distinct(further, "seed")))
    return ["--stages", "main", "--methods", *distinct(further, "method"), "--seeds", *seeds] if further else []
