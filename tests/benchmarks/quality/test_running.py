"""Resuming, tuning and failing, on a suite whose runs take no time."""

import dataclasses

import pytest
from quality import running, variants
from quality.jobs import Job
from quality.planning import Selection, jobs_of
from quality.results import read
from quality.running import run_jobs
from quality.suites import Suite

SELECTION = Selection(
    backbones=("a",), domains=("x", "y"), methods=("lora", "nara"), others=(), tune_domains=("x",), seeds=(0, 1)
)


class Fake:
    """Runs that note what they were asked; the lowest loss is at a learning rate of 2."""

    def __init__(self):
        self.ran, self.fails = [], lambda job, settings: None

    def run(self, job, settings):
        if (error := self.fails(job, settings)) is not None:
            raise error
        self.ran.append((job.stage, job.domain, job.method, job.control, job.seed, dict(settings)))
        base = {key: value for key, value in dataclasses.asdict(job).items() if key != "settings"}
        loss = abs(settings["learning_rate"] - 2)
        record = {**base, **settings, "validation_loss": loss}
        controls = (
            ("mean_core", "reversed") if job.method == "nara" and job.control is None and job.stage == "main" else ()
        )
        return [record, *({**record, "control": control} for control in controls)]


@pytest.fixture
def fake():
    return Fake()


@pytest.fixture
def suite(fake):
    return Suite(
        name="text",
        backbones=("a",),
        domains=("x", "y"),
        tune_domains=("x",),
        others=(),
        trials=lambda method: tuple({"learning_rate": float(rate)} for rate in (1, 2, 3)),
        ablations=(),
        ablation_domain="x",
        run=fake.run,
    )


def go(suite, stage, path, **options):
    return run_jobs(suite, jobs_of(suite, stage, SELECTION), path, **options)


def test_main_runs_with_the_rates_that_tuning_found(suite, fake, tmp_path):
    path = tmp_path / "r.jsonl"
    assert go(suite, "tune", path) == []
    assert len(fake.ran) == 6
    fake.ran.clear()
    assert go(suite, "main", path) == []
    assert {ran[-1]["learning_rate"] for ran in fake.ran} == {2.0}
    assert len(fake.ran) == 2 * 2 * (1 + 3)
    records = read(path)
    assert len(records) == 6 + 2 * 2 * (1 + 3 + 2)
    assert {"commit", "versions", "hardware", "date", "job"} <= records[0].keys()
    assert records[0]["trial"] == {"learning_rate": 1.0}


def test_a_stopped_benchmark_goes_on_where_it_was(suite, fake, tmp_path):
    path = tmp_path / "r.jsonl"
    go(suite, "tune", path)
    fake.ran.clear()
    fake.fails = lambda job, settings: KeyboardInterrupt() if (job.seed, job.domain) == (1, "x") else None
    with pytest.raises(KeyboardInterrupt):
        go(suite, "main", path)
    assert len(fake.ran) == 8
    path.write_bytes(path.read_bytes()[:-20])  # and the last record was cut off by a power cut
    fake.fails = lambda job, settings: None
    go(suite, "main", path)
    again = [ran for i, ran in enumerate(fake.ran) if ran in fake.ran[:i]]
    assert [ran[:-1] for ran in again] == [("main", "y", "nara", "shuffled", 0)]
    found = {(r["domain"], r["method"], r["control"], r["seed"]) for r in read(path) if r["stage"] == "main"}
    assert len(found) == 2 * 2 * (1 + 3 + 2)
    fake.ran.clear()
    go(suite, "main", path)
    assert fake.ran == []


def test_a_trial_may_diverge_but_a_run_that_does_is_a_failure(suite, fake, tmp_path):
    path = tmp_path / "r.jsonl"
    fake.fails = lambda job, settings: ArithmeticError("boom") if settings["learning_rate"] == 2.0 else None
    assert go(suite, "tune", path) == []
    assert [r["validation_loss"] for r in read(path)] == [1.0, None, 1.0] * 2
    fake.fails = lambda job, settings: ArithmeticError("boom") if job.method == "lora" and job.seed == 1 else None
    assert go(suite, "main", path) == ["main a x lora 1: boom", "main a y lora 1: boom"]
    assert sum(r["stage"] == "main" for r in read(path)) == 2 * (1 + 5) + 2 * 5
    fake.fails = lambda job, settings: None
    assert go(suite, "main", path) == []  # given again, it is tried again


def test_rates_have_to_be_tuned_or_waived(suite, fake, tmp_path):
    with pytest.raises(ValueError, match="lora isn't tuned on a"):
        go(suite, "main", tmp_path / "r.jsonl")
    assert fake.ran == []
    go(suite, "main", tmp_path / "r.jsonl", untuned=True)
    assert {ran[-1]["learning_rate"] for ran in fake.ran} == {1.0}


def test_runs_of_different_rates_are_not_mixed(suite, fake, tmp_path):
    path = tmp_path / "r.jsonl"
    go(suite, "main", path, untuned=True)
    go(suite, "tune", path)
    with pytest.raises(ValueError, match=r"main a x lora was run with \{'learning_rate': 1.0\}, but tuning now says"):
        go(suite, "main", path)


def test_a_variant_runs_as_its_method_and_is_recorded_under_its_own_name(suite, fake, tmp_path, monkeypatch):
    monkeypatch.setitem(variants.VARIANTS, "nara_smooth", ("nara", {"fourier_scale": 1.0}))
    job = Job("text", "main", "a", "x", "nara_smooth", None, 0, {"rank": 3})
    run_jobs(suite, [job], tmp_path / "r.jsonl", untuned=True)
    assert fake.ran == [("main", "x", "nara", None, 0, {"fourier_scale": 1.0, "learning_rate": 1.0, "rank": 3})]
    assert {record["method"] for record in read(tmp_path / "r.jsonl")} == {"nara_smooth"}
    assert running.resolve("lora") == ("lora", {})
