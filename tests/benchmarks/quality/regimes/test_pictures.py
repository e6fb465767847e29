"""Pictures of confirmed cells: one of the losses for each, and of a conversion one of samples."""

import numpy as np
from PIL import Image
from quality.regimes import pictures
from quality.regimes.fronts import Point
from quality.regimes.pictures import LABEL, SCALE, write_pictures
from quality.regimes.plan import Planned
from quality.regimes.runs import Cell

from tests.benchmarks.quality.regimes.test_report import ARMS, WINDOWED, records

WINDOWED_FILES = ("loss.png", "front.png", "front.csv")
POINTS = [Point("lora", "strength", strength, 1 - 0.2 * strength, 0.1, 0.3, 0.5) for strength in (0.5, 1.0)]


def test_write_pictures_draws_each_arm_in_a_row_of_its_own(tmp_path, monkeypatch):
    converted = Planned(Cell("eps_to_v", "attention", 4, 200), ("base", *ARMS))
    made = []

    def drawn(planned, _, arm, seed):
        made.append((planned.name, arm, seed))
        return [Image.new("RGB", (16, 16), (40 * len(made), 0, index)) for index in range(10)]

    monkeypatch.setattr(pictures, "_drawn", drawn)
    monkeypatch.setattr(pictures, "points_of", lambda *_: POINTS)
    found = [*records(converted), *records(WINDOWED)]
    paths = write_pictures([converted, WINDOWED], found, tmp_path / "new")
    names = ["eps_to_v-loss.png", "eps_to_v-samples.png"]
    assert [path.name for path in paths] == [*names, *(f"subject_low-{name}" for name in WINDOWED_FILES)]
    assert made == [("eps_to_v", arm, 200) for arm in ("base", "lora", "lora_params", "nara")]
    sheet = np.asarray(Image.open(paths[1]).convert("RGB"))
    side = 16 * SCALE
    for row in range(4):
        for column in range(10):
            pixel = sheet[row * (side + 4) + side // 2, LABEL + column * (side + 4) + side // 2]
            assert tuple(pixel) == (40 * (row + 1), 0, column)
    losses = [np.asarray(Image.open(path).convert("RGB")) for path in (paths[0], paths[2])]
    assert all(picture.std() > 10 for picture in losses)  # something is drawn
    assert not np.array_equal(*losses)


def test_write_pictures_before_all_runs_are_there_writes_nothing(tmp_path):
    assert write_pictures([WINDOWED], records(WINDOWED)[:-1], tmp_path / "new") == []
    assert not (tmp_path / "new").exists()
