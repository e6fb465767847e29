"""The plan's file: its tables are those of the code and the records, and confirmation needs it registered."""

import re
import subprocess

import pytest
from quality import results
from quality.regimes.plan import CONFIRM_SEEDS, DEV, DEV_SEEDS, NAMES, PLAN, chosen
from quality.regimes.plan_file import (
    FIRST,
    LAST,
    PLAN_FILE,
    ROOT,
    check_registered,
    plan_tables,
    registered,
    tables_in,
    write_plan,
)
from quality.regimes.rates import trial_runs

from tests.benchmarks.quality.regimes.test_running import developed, record


def test_the_plans_file_agrees_with_the_code_and_the_records():
    text = PLAN_FILE.read_text(encoding="utf-8")
    records = results.read(ROOT / "examples" / "benchmarks" / "results" / "regimes.jsonl")
    assert tables_in(text) == plan_tables(records)
    assert f"{CONFIRM_SEEDS[0]} to {CONFIRM_SEEDS[-1]}" in text
    assert f"{DEV_SEEDS[0]} to {DEV_SEEDS[-1]}" in text
    assert set(registered(text)) <= set(NAMES)
    listed = text.partition("## Methods")[2].partition("##")[0]
    assert set(re.findall(r"`(\w+)`", listed)) == {arm for planned in PLAN for arm in planned.arms}


def test_plan_tables_name_each_trials_mean_score_and_the_choice():
    text = plan_tables(developed())
    assert "| lora | 0.002: 0.5000; 0.005: 0.4000; 0.01: 0.5000; 0.02: 0.5000 | 0.005 |" in text
    assert "| nara_constant | as nara | 0.01 / 0.001 |" in text
    assert "| dora | 0.002: open; 0.005: open; 0.01: open; 0.02: open | open |" in text


@pytest.fixture
def plan_file(tmp_path):
    path = tmp_path / "plan.md"
    path.write_text(f"# Plan\n\nRegistered: none (draft)\n\n{FIRST}\n{LAST}\n\nEnd.\n", encoding="utf-8")
    run = lambda *argv: subprocess.run(["git", *argv], cwd=tmp_path, check=True, capture_output=True)  # noqa: E731
    run("init")
    run("config", "user.email", "a@b.example")
    run("config", "user.name", "a")
    return path


def commit(path):
    subprocess.run(["git", "add", path.name], cwd=path.parent, check=True)
    subprocess.run(["git", "commit", "-qm", "plan"], cwd=path.parent, check=True)


def test_check_registered_of_a_draft_raises(plan_file):
    write_plan(developed(), plan_file)
    commit(plan_file)
    with pytest.raises(ValueError, match="doesn't name eps_to_v as registered"):
        check_registered(["eps_to_v"], developed(), plan_file)


def test_check_registered_of_a_committed_plan_passes_until_it_changes(plan_file):
    plan_file.write_text(plan_file.read_text().replace("none (draft)", "eps_to_v, zero_snr"))
    write_plan(developed(), plan_file)
    assert plan_file.read_text().startswith("# Plan\n")
    assert plan_file.read_text().endswith(f"{LAST}\n\nEnd.\n")
    commit(plan_file)
    check_registered(["eps_to_v"], developed(), plan_file)
    other = record(trial_runs(chosen(["zero_snr"])[0], "lora")[0], DEV)  # another cell goes on with its development
    check_registered(["eps_to_v"], [*developed(), other], plan_file)
    with pytest.raises(ValueError, match="doesn't name subject_low as registered"):
        check_registered(["eps_to_v", "subject_low"], developed(), plan_file)
    at_an_end = [each | {"score": 0.1} if each["rates"] == {"learning_rate": 2e-2} else each for each in developed()]
    write_plan(at_an_end, plan_file)
    with pytest.raises(ValueError, match="in eps_to_v a chosen rate is an end of its grid: give its cell"):
        check_registered(["eps_to_v"], at_an_end, plan_file)
    write_plan(developed(), plan_file)
    with pytest.raises(ValueError, match=r"tables of plan\.md differ from the plan in code or the development records"):
        check_registered(["eps_to_v"], developed()[1:], plan_file)
    plan_file.write_text(plan_file.read_text() + "more\n")
    with pytest.raises(ValueError, match="has changes that aren't committed"):
        check_registered(["eps_to_v"], developed(), plan_file)


def test_write_plan_without_marks_raises(tmp_path):
    (tmp_path / "plan.md").write_text("# Plan\n")
    with pytest.raises(ValueError, match="lacks the marks"):
        write_plan([], tmp_path / "plan.md")
