"""nara-check on a regime: what it is told of held-out samples, by hand, and what its record and table say."""

import json

import pytest
import report_quality
import torch
from quality.regimes import runs
from quality.regimes.check import tasks
from quality.regimes.check.rows import ROWS, check_row, left_rows
from quality.regimes.check.table import check_table
from quality.regimes.images.conversion import Conversion
from quality.regimes.images.objectives import build_conversion
from quality.regimes.images.windowed import LOW, Windowed
from quality.regimes.plan import PLAN, is_deciding
from quality.regimes.runs import Cell

from nara_diffusion.check.trial import ARMS, CheckSettings
from nara_diffusion.check.verdict import LIKELY, UNKNOWN, UNLIKELY
from tests.helpers.adapted import disturb

RATES = {"learning_rate": 1e-2, "core_learning_rate": 2.5e-3}


@pytest.fixture
def regimes(monkeypatch, data):
    own = {"eps_to_v": Conversion("eps_to_v", lambda: data), "subject_low": Windowed(LOW, lambda: data)}
    for module in (tasks, runs):
        monkeypatch.setattr(module, "REGIMES", own)


@pytest.mark.parametrize("name", ["eps_to_v", "subject_low"])
def test_held_out_losses_are_those_of_the_next_bin_each(regimes, data, name):
    task = tasks.check_task(Cell(name, "attention", 2, 2), RATES, seed=3)
    disturb(task.model)
    task.model.eval()
    objective = build_conversion("eps" if name == "subject_low" else name, data.pipe.scheduler)
    for index, clean in enumerate(data.held_out):
        with torch.no_grad():
            found = task.held_out(range(5 * index, 5 * index + 5))
        batch, (hidden, pooled) = clean.corrupted(objective).batch, clean.embeddings
        given = {"text_embeds": pooled, "time_ids": clean.time_ids}
        with torch.no_grad():
            said, base = (
                unet(batch.model_input, batch.timestep, hidden, added_cond_kwargs=given).sample.double()
                for unet in (task.model, data.pipe.unet)
            )
        is_held = name == "subject_low" and index >= 5
        target = base if is_held else batch.target.double()
        own = (base - batch.target.double()).square().mean((1, 2, 3)) if is_held else 0
        assert torch.equal(found.noise_level, batch.timestep / 1000)
        assert (name == "subject_low") == (found.split is not None)
        assert found.split is None or found.split.held.tolist() == [is_held] * len(found.per_sample)
        expected = (said - target).square().mean((1, 2, 3)) + own
        torch.testing.assert_close(found.per_sample.double(), expected, rtol=1e-4, atol=1e-9)


def test_training_loss_of_positions_is_that_of_their_step(regimes, data):
    task = tasks.check_task(Cell("eps_to_v", "attention", 2, 2), RATES, seed=3)
    regime = tasks.REGIMES["eps_to_v"]
    step = regime.loss(regime.backbone.controlled(task.model, None, 3), task.args)
    with torch.no_grad():
        assert task.loss(range(10, 15)).loss == step(2)
        assert task.loss(range(10, 15)).loss != step(3)


def test_record_has_verdict_and_both_differences(regimes):
    record = check_row("eps_to_v", 0, CheckSettings(steps=1, samples=5, repeats=3))
    assert set(record["differences"]) == {"lora", "untold"}
    assert set(record["losses"]) == {"base", *ARMS}
    assert record["verdict"] == UNKNOWN
    assert {"command", "commit", "hardware", "versions", "core_seconds"} <= set(record)
    json.dumps(record, allow_nan=False)
    assert left_rows(["eps_to_v", "subject"], [0, 1], [record]) == [("subject", 0), ("eps_to_v", 1), ("subject", 1)]


def test_each_deciding_cell_of_the_plan_has_a_row_that_can_be_measured():
    assert {planned.cell for planned in PLAN if is_deciding(planned.cell)} <= set(ROWS.values())
    assert all(hasattr(runs.REGIMES[cell.regime], "held_out") for cell in ROWS.values())


def _known(row, nara, constant):
    """Ten seeds whose LoRA scores 1."""
    cell = ROWS[row]
    planned = next(planned for planned in PLAN if planned.cell == cell)
    scores = dict.fromkeys(planned.arms, 1.0) | {"nara": nara, "nara_constant": constant}
    return [
        {**vars(cell), "stage": "confirm", "arm": arm, "seed": seed, "score": score + 1e-3 * (seed % 3)}
        | {"losses": [score] * 10, "rates": {}}
        for arm, score in scores.items()
        for seed in range(200, 210)
    ]


def _record(row, verdict):
    difference = {"mean": -0.1, "low": -0.12, "high": -0.08}
    return {"row": row, "seed": 0, "verdict": verdict, "repeats": 3} | {
        "differences": {"lora": difference, "untold": difference}
    }


@pytest.mark.parametrize(
    ("nara", "constant", "verdict", "judged"),
    [
        (0.8, 1.0, LIKELY, "right"),
        (0.8, 1.0, UNLIKELY, "**wrong**"),
        (0.8, 1.0, UNKNOWN, "–"),
        (0.8, 0.8, LIKELY, "**wrong**"),  # as good without λ
        (1.0, 1.0, UNLIKELY, "right"),
    ],
)
def test_table_judges_the_verdict_by_the_confirmation(nara, constant, verdict, judged):
    line = check_table([_record("zero_snr", verdict)], _known("zero_snr", nara, constant)).splitlines()[-1]
    assert line.rstrip(" |").endswith(judged)
    assert "−10.0 % (−12.0 % to −8.0 %)" in line


def test_table_judges_nothing_before_the_confirmation_is_whole():
    line = check_table([_record("zero_snr", LIKELY)], _known("zero_snr", 0.8, 1.0)[1:]).splitlines()[-1]
    assert "| open |" in line
    assert line.rstrip(" |").endswith("–")


def test_the_page_of_nara_check_has_the_table_of_the_records():
    page = report_quality.ROOT / "docs" / "check.md"
    assert "| eps_to_v | 0 |" in page.read_text(encoding="utf-8")
    assert report_quality.filled(page) == page.read_text(encoding="utf-8")


def test_table_judges_nothing_where_runs_have_no_score():
    records = [each | {"score": None} if each["seed"] == 203 else each for each in _known("one_image", 0.8, 1.0)]
    line = check_table([_record("one_image", LIKELY)], records).splitlines()[-1]
    assert "| no interval |" in line
    assert line.rstrip(" |").endswith("–")
