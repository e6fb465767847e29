"""The pages that people read: their tables are what the committed records make, and they are short."""

import json
from pathlib import Path

import pytest
import report_quality
from quality.report.blocks import KINDS, Measured, all_tables, block
from quality.report.pages import fill
from quality.report.setting import hours, setting

from tests.benchmarks.quality.report.records import cells, record, runs

ROOT = Path(__file__).parents[4]
PAGE = "Before.\n\n<!-- table: loss text -->\n\nold\n\n<!-- end of table -->\n\nAfter.\n"
COST = {"parameters_ratio": 2.0, "memory_ratio": 1.0, "step_ratio": 1.0, "step_ratio_quartiles": [1.0, 1.0]}
RECORDS = [
    record("lora", 100, [1, 1], stage="tune", trial={"learning_rate": 0.1}),
    *runs("full", [0.6, 0.7], commit="abc123", exact_match=0.5),
    *runs("lora", [1.0, 1.1], exact_match=0.25),
    *runs("nara", [0.9, 1.0001], exact_match=0.25),
    *runs("nara", [1.0, 1.1], control="mean_core"),
    record("vera", 0, [1.5, 1.5], stage="single"),
    *runs("nara", [0.8, 0.9], stage="ablation", settings={"core_scale": 1.0}),
    record("nara", 0, [1, 1], stage="cost", **COST),
]
FURTHER = [record("lora", 7, [1.2, 1.2]), record("nara", 7, [1.0999, 1.0999])]


@pytest.fixture
def results(tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(each) + "\n" for each in [*RECORDS, *FURTHER]))
    return tmp_path


@pytest.mark.parametrize("name", report_quality.PAGES)
def test_the_committed_pages_have_the_tables_that_the_records_make(name):
    """After new records: `python examples/benchmarks/report_quality.py`."""
    page = ROOT / name
    assert report_quality.filled(page) == page.read_text(encoding="utf-8")


def test_the_committed_results_and_their_summary_stay_small():
    assert len((ROOT / "RESULTS.md").read_text(encoding="utf-8").splitlines()) <= 300
    assert sum(path.stat().st_size for path in report_quality.RESULTS.rglob("*.jsonl")) <= 1_500_000


def test_a_table_stands_between_its_marks_and_the_rest_is_left_alone():
    once = fill(PAGE, lambda name: f"table of {name}")
    assert once == PAGE.replace("old", "table of loss text")
    assert fill(once, lambda name: f"table of {name}") == once
    empty = "<!-- table: a -->\n<!-- end of table -->\n" + "<!-- table: b -->\n<!-- end of table -->\n"
    assert [line for line in fill(empty, str.upper).splitlines() if len(line) == 1] == ["A", "B"]
    with pytest.raises(ValueError, match='needs a line "<!-- end of table -->"'):
        fill("<!-- table: a -->\n", str)


def test_a_table_that_there_isnt_is_refused(results):
    with pytest.raises(ValueError, match=r"a table is called 'los text tiny', expected .*loss, domains"):
        block("los text tiny", results)
    with pytest.raises(ValueError, match=r"a table is called 'loss text', expected"):
        block("loss text", results)
    with pytest.raises(ValueError, match=r"text\.jsonl has no record of 'tinny'"):
        block("loss text tinny", results)


def test_further_seeds_of_some_methods_stand_in_the_table_of_more_alone(results):
    few = cells(block("loss text tiny", results))
    assert few["LoRA"][0] == "1.0500 ± 0.0707"
    more = cells(block("more text tiny", results))
    assert more["NaRA"][1].startswith("**−0.1000**")
    assert "full fine-tuning" not in more
    with pytest.raises(ValueError, match="no method has other seeds than 0, 1, 2, 3, 4"):
        KINDS["more"](Measured(RECORDS))


def test_the_summary_has_a_row_a_method_and_no_control(results):
    rows = cells(block("summary text", results))
    assert rows["method"] == ["tiny: loss − LoRA", "gap closed", "exact match"]
    assert list(rows)[1:] == ["full fine-tuning", "LoRA", "NaRA"]
    assert rows["NaRA"] == ["−0.1000 [−0.1006, −0.0993]".replace("−0.1000", "**−0.1000**"), "25 %", "0.250 ± 0.000"]
    other = [{**each, "backbone": "small"} for each in runs("lora", [1, 2])]
    both = results / "both.jsonl"
    both.write_text("".join(json.dumps(each) + "\n" for each in [*RECORDS, *other]))
    assert cells(block("summary both", results))["NaRA"][3:] == ["–", "–"]


def test_the_setting_names_seeds_commits_and_hours():
    records = [*runs("lora", [1, 1], commit="abc123"), *runs("lora", [1, 1, 1], backbone="small"), *FURTHER]
    text = setting(records)
    assert "* tiny: code; 2 seeds (0 and 1), 1 more of some methods (7); 4 records." in text
    assert "* small: code; 3 seeds (0, 1 and 2); 3 records." in text
    assert "* Commits: abc123." in text


def test_records_of_one_run_share_its_time():
    own = record("nara", 0, [1, 1], seconds=1800.0, last=False)
    control = record("nara", 0, [1, 1], control="mean_core", seconds=3600.0, last=True)
    assert hours([own, control, record("lora", 0, [1, 1], seconds=3600.0)]) == 2.0


def test_other_results_get_all_their_tables_and_pictures(results, tmp_path):
    report_quality.main([results / "text.jsonl"], output_dir=tmp_path / "own")
    text = (tmp_path / "own" / "tables.md").read_text()
    headings = [line for line in text.splitlines() if line.startswith("#")]
    wanted = ("loss", "domains", "exact_match", "bins", "controls", "trials", "cost", "single", "ablations", "more")
    assert headings == ["# text", *(f"## tiny: {kind}" for kind in wanted)]
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "own").glob("*.png")}
    assert set(pictures) == {"text-tiny-loss.png", "text-tiny-controls.png"}
    report_quality.main([results / "text.jsonl"], output_dir=tmp_path / "again")
    assert pictures == {path.name: path.read_bytes() for path in (tmp_path / "again").glob("*.png")}
    assert "##" not in all_tables([{**RECORDS[0], "stage": "another"}])


def test_results_are_packed_to_a_file(results, tmp_path):
    report_quality.main([results / "text.jsonl"], pack_to=tmp_path / "packed.jsonl")
    assert (tmp_path / "packed.jsonl").read_text().startswith('{"form": "changes"}\n')
    assert block("loss packed tiny", tmp_path) == block("loss text tiny", results)
