"""Resuming, choosing rates, registering and refusing, with runs that take no time."""

import json
import re
from dataclasses import replace

import pytest
from quality import results
from quality.regimes.cost import left_table, seconds_of
from quality.regimes.plan import CONFIRM, CONFIRM_SEEDS, DEV, DEV_SEEDS, NAMES, PLAN, RATES_OF, TRIALS, Planned, chosen
from quality.regimes.rates import chosen_rates, is_at_an_end, trial_runs
from quality.regimes.running import Wish, core_hours, left_of, make, runs_of
from quality.regimes.runs import REGIMES, Cell, Run, rounded

PLANNED = Planned(Cell("eps_to_v", "attention", 4, 200), ("lora", "nara", "nara_constant"), (100, 101))
BEST = {"lora": 1, "nara": 2}
WISH = Wish([PLANNED])


def record(run: Run, stage: str, samples: bool = False, score: float | None = 0.5):
    return {"stage": stage, **run.named, "score": score, "losses": [0.5] * 10, "core_seconds": 36.0}


def developed(planned: Planned = PLANNED):
    """Records of all trials, of which the one in BEST is the best."""
    return [
        record(run, DEV, score=0.4 if dict(run.rates) == dict(TRIALS[arm][BEST.get(arm, 0)]) else 0.5)
        for arm in planned.arms
        if arm not in RATES_OF
        for run in trial_runs(planned, arm)
    ]


def test_runs_of_dev_are_every_trial_on_every_seed_and_none_of_an_ablation():
    runs = runs_of(DEV, WISH, [])
    assert {(run.arm, run.seed, tuple(run.rates.items())) for run in runs} == {
        (arm, seed, tuple(trial.items())) for arm in ("lora", "nara") for seed in (100, 101) for trial in TRIALS[arm]
    }
    assert len(runs) == 16


def test_runs_of_confirm_have_the_rates_of_the_best_trial_seed_after_seed():
    runs = runs_of(CONFIRM, WISH, developed())
    assert [run.seed for run in runs] == [seed for seed in CONFIRM_SEEDS for _ in range(3)]
    expected = {"lora": TRIALS["lora"][1], "nara": TRIALS["nara"][2], "nara_constant": TRIALS["nara"][2]}
    assert all(run.rates == expected[run.arm] for run in runs)


def test_chosen_rates_are_of_the_mean_over_seeds():
    records = developed()
    for each in records:  # on one seed the second trial of LoRA is the best by little, on the other the worst by far
        if each["arm"] == "lora" and each["rates"] == TRIALS["lora"][1]:
            each["score"] = 0.39 if each["seed"] == 100 else 0.9
        elif each["arm"] == "lora" and each["rates"] == TRIALS["lora"][3]:
            each["score"] = 0.45
    assert chosen_rates(records, PLANNED, "lora") == TRIALS["lora"][3]


def test_chosen_rates_ignore_confirmation_runs_and_trials_that_diverged():
    records = developed()
    records += [record(Run(PLANNED.cell, "lora", 200, TRIALS["lora"][0]), CONFIRM, score=0.0)]
    for each in records:
        if each["arm"] == "nara" and each["rates"] == TRIALS["nara"][2] and each["seed"] == 101:
            each["score"] = None
    assert chosen_rates(records, PLANNED, "lora") == TRIALS["lora"][1]
    assert chosen_rates(records, PLANNED, "nara") != TRIALS["nara"][2]


def test_chosen_rates_without_all_trials_raise():
    with pytest.raises(ValueError, match="lora in eps_to_v, attention, rank 4, 200 steps lacks 1 development runs"):
        chosen_rates(developed()[1:], PLANNED, "lora")
    with pytest.raises(ValueError, match="every trial of nara in eps_to_v"):
        chosen_rates([each | {"score": None} for each in developed()], PLANNED, "nara_constant")


def test_make_after_a_stop_makes_what_is_left(tmp_path):
    path, made = tmp_path / "r.jsonl", []

    def stopping(run, stage, samples):
        assert not samples  # of development
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append(run)
        return record(run, stage)

    runs = runs_of(DEV, WISH, [])
    with pytest.raises(KeyboardInterrupt):
        make(runs, DEV, path, 16, stopping)
    left = left_of(runs, results.read(path))
    assert left == runs[5:]
    assert make(left, DEV, path, 16, record) == 0
    assert [each["rates"] for each in results.read(path)] == [dict(run.rates) for run in runs]
    assert left_of(runs, results.read(path)) == []


def test_make_of_confirmation_runs_draws_samples_on_attention_at_rank_4_alone(tmp_path):
    drawn = {}
    runs = [
        Run(Cell("eps_to_v", targets, rank, 200), "base", 200, {})
        for targets in ("attention", "all")
        for rank in (1, 4)
    ]

    def noting(run, stage, samples):
        drawn[run.cell.targets, run.cell.rank] = samples
        return record(run, stage)

    make(runs, CONFIRM, tmp_path / "r.jsonl", 16, noting)
    assert [cell for cell, samples in drawn.items() if samples] == [("attention", 4)]
    assert len(drawn) == 4


def test_the_base_has_no_rates_and_no_development_runs():
    planned = replace(PLANNED, arms=("base", "lora"))
    assert {run.arm for run in runs_of(DEV, Wish([planned]), [])} == {"lora"}
    runs = runs_of(CONFIRM, Wish([planned], arms=["base"]), [])
    assert [(run.arm, run.rates, run.seed) for run in runs] == [("base", {}, seed) for seed in CONFIRM_SEEDS]


def test_make_within_a_budget_stops_when_it_is_spent(tmp_path):
    path = tmp_path / "r.jsonl"
    runs = runs_of(DEV, WISH, [])
    assert make(runs, DEV, path, 0.05, record) == 11  # 5 runs of 36 s
    assert core_hours(results.read(path)) == pytest.approx(0.05)
    assert make(left_of(runs, results.read(path)), DEV, path, 0.05, record) == 11


def test_seeds_of_the_other_stage_raise():
    with pytest.raises(ValueError, match=r"--seeds has \[200\], but dev has the seeds 100 to 104"):
        runs_of(DEV, Wish([PLANNED], seeds=[100, 200]), [])
    with pytest.raises(ValueError, match=r"--seeds has \[0, 104\], but confirm has the seeds 200 to 209"):
        runs_of(CONFIRM, Wish([PLANNED], seeds=[104, 0]), developed())
    assert not set(DEV_SEEDS) & set(CONFIRM_SEEDS)


def test_confirmation_with_other_rates_than_before_raises():
    records = [*developed(), record(Run(PLANNED.cell, "lora", 203, TRIALS["lora"][0]), CONFIRM)]
    with pytest.raises(ValueError, match=r"lora of seed 203 in .* was confirmed with \{'learning_rate': 0.002\}"):
        runs_of(CONFIRM, WISH, records)


def test_chosen_tells_the_deciding_cell_from_the_others():
    assert [planned.cell for planned in chosen(["zero_snr"])] == [Cell("zero_snr", "attention", 4, 200)]
    assert [planned.cell for planned in chosen(["zero_snr_reach"])] == [Cell("zero_snr", "all", 4, 200)]
    assert sorted(map(id, chosen(NAMES))) == sorted(map(id, PLAN))


def test_chosen_of_an_unknown_regime_raises():
    with pytest.raises(ValueError, match="--regimes has edm, expected of eps_to_v, eps_to_flow, zero_snr, subject_low"):
        chosen(["eps_to_v", "edm"])
    assert {planned.cell.regime for planned in PLAN} == set(REGIMES) - {"subject"}  # which RESULTS.md has
    assert all({arm for arm in planned.arms if arm not in RATES_OF} <= set(planned.grid) for planned in PLAN)
    assert len({len(trials) for arm, trials in TRIALS.items() if arm != "base"}) == 1  # equally many for each


def test_left_table_counts_runs_and_core_hours():
    records = developed()[:6]
    text = left_table([DEV, CONFIRM], WISH, records)
    assert "| dev | eps_to_v | attention | 4 | 200 | 16 | 10 | 0.10 |" in text
    assert "| confirm | eps_to_v | attention | 4 | 200 | 30 | 30 | 0.30 |" in text
    assert text.endswith("0.4 core hours left, 0.06 spent")
    assert seconds_of(Cell("zero_snr", "attention", 4, 100), records) == pytest.approx(18)


def test_a_record_has_few_digits():
    assert rounded({"a": [0.123456789, {"b": 1 / 3}], "n": 5, "s": "x"}) == {
        "a": [0.123457, {"b": 0.333333}],
        "n": 5,
        "s": "x",
    }


def test_further_trials_of_a_cell_are_tried_and_chosen():
    planned = replace(PLANNED, further={"lora": ({"learning_rate": 4e-2},)})
    records = developed(planned)
    assert len(runs_of(DEV, Wish([planned], arms=["lora"]), [])) == 10
    for each in records:
        if each["rates"] == {"learning_rate": 4e-2}:
            each["score"] = 0.3
    assert chosen_rates(records, planned, "lora") == {"learning_rate": 4e-2}
    assert is_at_an_end(planned, "lora", {"learning_rate": 4e-2})
    assert is_at_an_end(planned, "lora", {"learning_rate": 2e-3})
    assert not is_at_an_end(planned, "lora", {"learning_rate": 2e-2})
    assert not is_at_an_end(planned, "nara", TRIALS["nara"][0])


# ---------------------------------------------------------------------- the command


def command(*argv):
    from benchmark_regimes import run

    return run(list(argv))


def test_command_dry_run_says_what_is_left(tmp_path, capsys):
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in developed()[:3]))
    assert command("--dry_run", "--regimes", "eps_to_v", "--methods", "lora", "nara", "--output", str(path)) == 0
    assert "| dev | eps_to_v | attention | 4 | 200 | 16 | 13 | 0.13 |" in capsys.readouterr().out


def test_command_confirm_of_a_draft_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("quality.regimes.plan_file.registered", lambda text: [])
    found = command("--stages", "confirm", "--regimes", "subject_low", "--output", str(tmp_path / "r.jsonl"))
    assert re.fullmatch("error: regimes_plan.md doesn't name subject_low as registered: [^\n]*", str(found))


def test_command_unknown_regime_is_one_line():
    assert re.fullmatch("error: --regimes has edm, expected of [^\n]*", str(command("--regimes", "edm")))


def test_command_runs_and_resumes(tmp_path, monkeypatch, capsys):
    path = tmp_path / "r.jsonl"
    made = []
    monkeypatch.setattr(
        "benchmark_regimes.make", lambda runs, stage, output, budget: made.append((runs, stage, output, budget)) or 0
    )
    path.write_text("".join(json.dumps(each) + "\n" for each in developed()[:3]))
    asked = ["--regimes", "zero_snr", "--methods", "lora", "--seeds", "100", "--budget_hours", "2"]
    assert command(*asked, "--output", str(path)) == 0
    ((runs, stage, output, budget),) = made
    assert {(run.cell.regime, run.arm, run.seed) for run in runs} == {("zero_snr", "lora", 100)}
    assert (stage, output, budget) == ("dev", path, 2)
    assert "0.03 core hours" in capsys.readouterr().out
