"""What a record says of how it was made, and what no record says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import benchmark_blocks
import benchmark_few_steps
import benchmark_record
import pytest
import report_quality
from quality import results
from quality.regimes.runs import Cell, Run, record_of

ABSOLUTE = re.compile(r"""(?<![\w.:/)\]-])/[A-Za-z_][\w.-]*/[\w.-]""")
RECORDS = sorted(path for path in report_quality.RESULTS.rglob("*.json*"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.relative_to(report_quality.RESULTS).as_posix())
def test_no_record_holds_an_absolute_path(path: Path):
    assert ABSOLUTE.findall(path.read_text(encoding="utf-8")) == []


def test_record_command_has_no_local_folder(monkeypatch):
    script = str(benchmark_record.ROOT / "examples" / "benchmarks" / "benchmark_blocks.py")
    monkeypatch.setattr(sys, "argv", [script, "--output", "/tmp/mine/a.jsonl", "--base=/data/gemma", "--steps", "1"])
    command = benchmark_record.provenance.__wrapped__()["command"]
    assert command.endswith("examples/benchmarks/benchmark_blocks.py --output a.jsonl --base=gemma --steps 1")
    assert ABSOLUTE.search(command) is None


def test_benchmarks_find_the_programs_that_they_measure():
    """As programs, without the paths of pyproject.toml."""
    code = "import quality; from importlib.util import find_spec as f; assert f('check') and f('identity_reading')"
    folder = benchmark_record.ROOT / "examples" / "benchmarks"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A repository with two commits on main, and one on the branch that is checked out."""

    def git(*words: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--initial-branch", "main")
    for number in range(3):
        (tmp_path / "code.py").write_text(str(number))
        git("add", ".")
        git("commit", "-m", str(number))
        if number == 1:
            git("checkout", "-b", "own")
    monkeypatch.setattr(benchmark_record, "ROOT", tmp_path)
    monkeypatch.setattr(benchmark_record, "provenance", lambda: {"commit": benchmark_record.commit()})
    return git


def test_confirming_record_has_date_and_commit(clone):
    record = benchmark_record.made_in("confirm")
    assert record["commit"] == clone("rev-parse", "HEAD")
    assert record["main"] == clone("rev-parse", "main") != record["commit"]
    assert record["date"][:4] == results.now()[:4]
    assert "main" not in benchmark_record.made_in("dev")


def test_confirming_run_refuses_a_tree_with_changes(clone, tmp_path):
    (tmp_path / "code.py").write_text("changed")
    assert benchmark_record.made_in("dev")["commit"].endswith("+")
    words = ["--stage", "confirm", "--output", str(tmp_path / "new.jsonl")]
    confirming = [
        lambda: benchmark_few_steps.main(words),
        lambda: benchmark_blocks.main(words),
        lambda: record_of(Run(Cell("eps_to_v", "attention", 4, 1), "lora", 0, {"learning_rate": 0.1}), "confirm"),
    ]
    for run in confirming:
        with pytest.raises(ValueError, match="has changes that aren't committed"):
            run()


def test_confirming_run_needs_a_main(clone):
    clone("branch", "-D", "main")
    with pytest.raises(ValueError, match="no branch main"):
        benchmark_record.made_in("confirm")
