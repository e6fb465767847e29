"""Pictures in records: what goes in comes out, and the report shows each method's row."""

import numpy as np
from PIL import Image
from quality.report.data import Grid
from quality.report.samples import GAP, LABELS, samples_sheet
from quality.strips import packed, unpacked

from tests.benchmarks.quality.report_records import record

COLOURS = [(220, 30, 40), (20, 200, 60), (30, 60, 210)]


def images(*colours):
    return [Image.new("RGB", (16, 24), colour) for colour in colours]


def test_a_row_comes_back_as_it_was_but_for_what_jpeg_loses():
    row = unpacked(packed(images(*COLOURS)))
    assert row.size == (48, 24)
    for index, colour in enumerate(COLOURS):
        cell = np.asarray(row)[:, 16 * index : 16 * index + 16].astype(int)
        assert abs(cell - np.array(colour)).max() <= 8


def test_the_sheet_has_a_row_for_each_method_that_kept_samples(tmp_path):
    records = [
        record("nara", 0, [1, 1], samples_jpeg=packed(images(COLOURS[0], COLOURS[1]))),
        record("nara", 1, [1, 1]),
        record("lora", 0, [1, 1], samples_jpeg=packed(images(COLOURS[2], COLOURS[2]))),
        record("dora", 0, [1, 1]),
        record("lora", 0, [1, 1], domain="other", samples_jpeg=packed(images(COLOURS[1]))),
    ]
    grid = Grid.of(records)
    assert samples_sheet(grid, "code", tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    assert sheet.shape == (2 * (24 + GAP), LABELS + 32, 3)
    lora, nara = sheet[8, LABELS + 8], sheet[24 + GAP + 8, LABELS + 8]  # LoRA stands first
    assert abs(lora - np.array(COLOURS[2])).max() <= 8
    assert abs(nara - np.array(COLOURS[0])).max() <= 8
    assert (sheet[:24, :LABELS] < 128).any()  # its name


def test_there_is_no_sheet_without_samples(tmp_path):
    assert not samples_sheet(Grid.of([record("lora", 0, [1, 1])]), "code", tmp_path / "sheet.png")
    assert not (tmp_path / "sheet.png").exists()
