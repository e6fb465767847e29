"""Tables and pictures come from the committed records, and pages show the tables that the records make."""

from __future__ import annotations

import pytest
import report_quality
from quality import results
from quality.regimes.alternatives import RECORDS, SEEDS
from quality.regimes.plan import PLAN, cell_of
from quality.regimes.report import report, summary
from quality.regimes.runs import Run, record_of


@pytest.mark.parametrize("name", report_quality.PAGES)
def test_page_shows_the_tables_of_the_records(name):
    page = report_quality.ROOT / name
    assert report_quality.filled(page) == page.read_text(encoding="utf-8")


def test_report_of_the_regimes_is_that_of_its_page():
    records = results.read(report_quality.RESULTS / "regimes.jsonl")
    text = report(PLAN, records)
    page = (report_quality.ROOT / "docs" / "results" / "regimes.md").read_text(encoding="utf-8")
    assert page.endswith(f"\n\n{text}\n")
    assert summary(PLAN, records).splitlines()[2].startswith("| eps_to_v | ")


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
def test_run_of_a_record_gives_its_figures_again(regime, arm):
    """Each is far from those of the regime without the bias, token, gain or shift."""
    own = [r for r in results.read(RECORDS) if (r["regime"], r["arm"], r["seed"]) == (regime, arm, SEEDS[0])]
    record = min(own, key=lambda record: record["rank"])
    again = record_of(Run(cell_of(record), arm, SEEDS[0], record["rates"]), "confirm")
    assert again["losses"] == pytest.approx(record["losses"], rel=0.03)
    assert again["trainable_parameters"] == record["trainable_parameters"]
