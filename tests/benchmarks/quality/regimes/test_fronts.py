"""The front of a windowed regime: the strengths that are measured are those that its points name."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image
from quality.regimes import fronts
from quality.regimes.fronts import PLAIN, SCHEDULED, Point, outside, points_of, write_front
from quality.regimes.images.windowed import HIGH, LOW, Windowed
from quality.regimes.methods import arm_arguments, build
from quality.regimes.plan import Planned
from quality.regimes.runs import Cell, Trained

from tests.helpers.adapted import disturb


@pytest.mark.parametrize(("window", "values"), [(LOW, [1, 1, 0.25, 0.25]), (HIGH, [0.25, 0.25, 1, 1])])
def test_outside_is_one_inside_of_the_window_and_the_strength_elsewhere(window, values):
    assert outside(Windowed(window), 0.25)([0.0, 0.499, 0.5, 1.0]).tolist() == values


@pytest.fixture
def points(data, monkeypatch):
    """Those of a LoRA, a NaRA and a gated NaRA of random weights, with the figures of an independent formula."""
    regime, models = Windowed(LOW, lambda: data), {}

    def trained(run):
        arm = run.arm.removesuffix("_gated")
        model = build(arm, arm_arguments(arm, targets="attention", rank=2, steps=2, seed=0)).eval()
        disturb(model)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data *= 0.1
        models[run.arm] = model
        return Trained(model, 2, [])

    monkeypatch.setitem(fronts.REGIMES, "subject_low", regime)
    monkeypatch.setattr(fronts, "train", trained)
    monkeypatch.setattr(fronts, "chosen_rates", lambda *_: {})
    monkeypatch.setattr(fronts, "sampled", lambda *_: {"similarity": 0.25, "alignment": 0.5})
    planned = Planned(Cell("subject_low", "attention", 2, 2), ("base", "lora", "full", "nara", "nara_gated"))
    return list(points_of(planned, [], 200))


def test_points_are_of_each_strength_which_scales_both_sides_and_of_a_schedule_the_outside_alone(points):
    plain, scheduled = [(PLAIN, s) for s in (0.25, 0.5, 0.75, 1.0)], [(SCHEDULED, s) for s in (0.0, 0.25, 0.5)]
    expected = [(arm, *each) for arm in ("lora", "nara") for each in (*plain, *scheduled)]
    assert [(p.arm, p.kind, p.strength) for p in points] == [*expected, ("nara_gated", SCHEDULED, 0.0)]

    for arm in ("lora", "nara"):
        own = {(p.kind, p.strength): p for p in points if p.arm == arm}
        whole = own[PLAIN, 1.0]
        assert [own[SCHEDULED, s].inside for s in (0.0, 0.25, 0.5)] == [whole.inside] * 3
        drifts = [own[SCHEDULED, s].drift for s in (0.0, 0.25, 0.5)]
        assert drifts[0] == 0
        assert drifts[1:] == [own[PLAIN, s].drift for s in (0.25, 0.5)]
        assert 0 < drifts[1] < drifts[2] < whole.drift
        assert len({own[PLAIN, s].inside for s in (0.25, 0.5, 0.75, 1.0)}) == 4
    (gated,) = (p for p in points if p.arm == "nara_gated")
    assert gated.drift == 0
    assert torch.tensor([p.alignment for p in points]).eq(0.5).all()


def test_a_front_is_written_as_a_table_and_a_picture(tmp_path):
    points = [
        Point(arm, PLAIN, s, 1 - 0.2 * s, 0.1 * s, 0.3, 0.5 - s / 10) for arm in ("lora", "nara") for s in (0.5, 1)
    ]
    write_front(points, tmp_path / "f.png", tmp_path / "f.csv")
    with open(tmp_path / "f.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[3] == {
        "arm": "nara", "kind": PLAIN, "strength": "1", "inside": "0.8", "drift": "0.1", "similarity": "0.3",
        "alignment": "0.4",
    }  # fmt: skip
    assert len(rows) == 4
    assert np.asarray(Image.open(tmp_path / "f.png").convert("RGB")).std() > 10
