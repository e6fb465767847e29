"""One run of each kind, small, through the function that the benchmark calls."""

import json

import pytest
import torch
from quality.text.runs import run_one, text_records
from quality.text.validation import CENTRES, binned_loss

from tests.benchmarks.quality.conftest import SMALL

RUN = {
    "sizes": SMALL,
    "steps": 3,
    "batch_size": 8,
    "core_scale": 1.0,
    "learning_rate": 1e-2,
    "core_learning_rate": 1e-1,
}
RUN |= {"rank": 3}


def nara(**settings):
    return text_records("llada-tiny", "code", "nara", 5, **RUN | settings)


@pytest.fixture(scope="module")
def records():
    return nara(keep_model=True)


def test_a_record_says_what_was_run_and_what_came_of_it(records, task):
    model = records[0].pop("model")
    first = records[0]
    json.dumps(records, allow_nan=False)
    named = ("suite", "stage", "backbone", "domain", "method", "control", "seed", "rank", "steps")
    assert [first[name] for name in named] == ["text", "main", "llada-tiny", "code", "nara", None, 5, 3, 3]
    assert (first["learning_rate"], first["core_learning_rate"]) == (1e-2, 1e-1)
    assert first["settings"]["core_scale"] == 1.0
    assert first["settings"]["batch_size"] == 8
    assert first["noise_levels"] == CENTRES
    loss = binned_loss(model, task.validation, lambda batch: batch.noise_level)
    assert first["losses"] == pytest.approx(loss.losses, abs=1e-6)
    assert first["loss_errors"] == pytest.approx(loss.errors, abs=1e-6)
    assert first["validation_loss"] == pytest.approx(loss.mean, abs=1e-6)
    assert first["trainable_parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert first["trainable_parameters"] > 3 * 3 * 512
    assert (first["n"], first["n_exact_match"]) == (30, 8)
    assert all(first[name] > 0 for name in ("step_ms", "peak_memory_mib", "seconds"))
    assert 0 <= first["exact_match"] <= 1


def test_the_trained_adapter_is_measured_under_wrong_noise_levels_too(records):
    assert [record["control"] for record in records] == [None, "mean_core", "reversed"]
    assert len({record["validation_loss"] for record in records}) == 3
    assert len({record["train_loss"] for record in records}) == 1


def test_the_same_seed_gives_the_same_figures_and_another_one_does_not(records):
    again = nara(evaluated=())
    assert len(again) == 1
    assert again[0]["losses"] == records[0]["losses"]
    assert run_one("llada-tiny", "code", "nara", 6, **RUN)["losses"] != records[0]["losses"]


def test_controls_of_training_are_trained_otherwise(records):
    constant, shuffled = (nara(control=control) for control in ("constant", "shuffled"))
    assert [record["control"] for record in (*constant, *shuffled)] == ["constant", "shuffled"]
    assert len({found["validation_loss"] for found in (records[0], constant[0], shuffled[0])}) == 3


def test_tuning_measures_the_loss_on_other_questions(records, task):
    tuned = nara(stage="tune", keep_model=True)
    assert len(tuned) == 1
    model = tuned[0]["model"]
    loss = binned_loss(model, task.tuning, lambda batch: batch.noise_level)
    assert tuned[0]["losses"] == pytest.approx(loss.losses, abs=1e-6)
    assert tuned[0]["exact_match"] is None
    assert tuned[0]["n"] == 20
    texts = {question.text for question in task.data.validation.questions}
    assert texts.isdisjoint(question.text for question in task.data.tuning.questions)


def test_the_base_is_measured_as_it_is(task):
    found = run_one("llada-tiny", "code", "base", 0, sizes=SMALL)
    loss = binned_loss(task.model, task.validation, lambda batch: batch.noise_level)
    assert found["losses"] == pytest.approx(loss.losses, abs=1e-6)
    assert (found["trainable_parameters"], found["steps"], found["rank"]) == (0, 0, None)


@pytest.mark.parametrize(
    "method",
    ["full", "dora", "nara_dora", "nara_c", "multi_lora", "tlora", "rslora", "pissa", "hira", "vera", "adalora", "oft",
     "prompt_tuning", "p_tuning"],
)  # fmt: skip
def test_every_other_method_trains_and_leaves_the_shared_model_as_it_was(method, task):
    before = [p.clone() for p in task.model.parameters()]
    settings = {name: RUN[name] for name in ("sizes", "steps", "batch_size")}
    found = run_one("llada-tiny", "code", method, 0, stage="tune", rank=4, **settings)
    assert found["method"] == method
    assert found["trainable_parameters"] > 0
    assert all(torch.equal(p, was) for p, was in zip(task.model.parameters(), before, strict=True))
    base = binned_loss(task.model, task.tuning, lambda batch: batch.noise_level)
    assert found["validation_loss"] != pytest.approx(base.mean, abs=1e-6)


def test_dreams_family_runs_as_well():
    found = run_one("dream-tiny", "arithmetic", "nara", 0, **RUN)
    assert found["backbone"] == "dream-tiny"


def test_what_can_not_be_run_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr("quality.text.runs.load_task", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="method is 'lorra', expected one of nara, nara_dora"):
        run_one("llada-tiny", "code", "lorra", 0)
    with pytest.raises(ValueError, match="core_size is neither a field of Recipe nor an argument of an adapter"):
        run_one("llada-tiny", "code", "nara", 0, core_size=3)
    with pytest.raises(ValueError, match="knows no λ"):
        text_records("llada-tiny", "code", "dora", 0, control="shuffled")
