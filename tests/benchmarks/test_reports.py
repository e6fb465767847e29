"""Tables and pictures come from the committed records, and pages show the tables that the records make."""

from __future__ import annotations

import pytest
import report_quality
from quality import results
from quality.regimes.plan import PLAN
from quality.regimes.report import report, summary


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
