"""Tables and pictures come from the committed records, and pages show the tables that the records make."""

from __future__ import annotations

import benchmark_regimes
import pytest
import report_quality
from quality import results
from quality.regimes.alternatives import RECORDS, SEEDS
from quality.regimes.plan import PLAN, cell_of
from quality.regimes.report import report
from quality.regimes.runs import Run, record_of

LARGE = "examples/benchmarks/results/blocks.md"  # its differences over prompts take six seconds
PAGES = [pytest.param(name, marks=[pytest.mark.slow] if name == LARGE else []) for name in report_quality.PAGES]


@pytest.mark.parametrize("name", PAGES)
def test_page_shows_the_tables_of_the_records(name):
    page = report_quality.ROOT / name
    assert report_quality.filled(page) == page.read_text(encoding="utf-8")


def test_regimes_report_has_every_cells_verdict():
    text = report(PLAN, results.read(report_quality.RESULTS / "regimes.jsonl"))
    sections = text.split("\n### ")
    assert len(sections) == len(PLAN)
    assert sections[0].startswith("### eps_to_v: attention, rank 4, 200 steps (10 seeds)")
    assert "**nara wins: yes.**" in sections[0]
    assert "| nara | 203920 | 0.3255 ± 0.0095 | **−0.0785** ± 0.0054 | 10 |" in sections[0]


def test_alternatives_report_has_every_arm(capsys):
    assert benchmark_regimes.main(["--alternatives", "eps_to_v", "--report"]) == 0
    text = capsys.readouterr().out
    assert "| LoRA, read by the identity, r 4 | 47488 | 0.01 | 0.1977 ± 0.0016 |" in text
    assert "| NaRA, r 4 | LoRA, read by the identity, r 4 | **+0.1265** ± 0.0049 |" in text


@pytest.mark.slow
def test_report_of_other_records_has_tables_and_pictures(tmp_path):
    report_quality.main([report_quality.RESULTS / "images.jsonl"], output_dir=tmp_path)
    assert "| NaRA |" in (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert len(list(tmp_path.glob("*.png"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("regime", "arm"),
    [
        ("blind_open_bias", "lora"),
        ("blind_open_told", "lora"),
        ("noise_offset_gain", "gain"),
        ("noise_offset_shift", "nara_knots"),
    ],
)
@pytest.mark.usefixtures("committed")
def test_run_of_a_record_gives_its_figures_again(regime, arm):
    """Each is far from those of the regime without the bias, token, gain or shift."""
    records = [r for r in results.read(RECORDS) if (r["regime"], r["arm"], r["seed"]) == (regime, arm, SEEDS[0])]
    record = min(records, key=lambda record: record["rank"])
    again = record_of(Run(cell_of(record), arm, SEEDS[0], record["rates"]), "confirm")
    assert again["losses"] == pytest.approx(record["losses"], rel=0.03)
    assert again["trainable_parameters"] == record["trainable_parameters"]
