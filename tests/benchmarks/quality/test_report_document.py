"""RESULTS.md end to end, from made-up results and notes."""

import json
from importlib import import_module

import pytest
from quality.report.design import DESIGN
from quality.report.document import hours, more_seeds, read_notes, setting
from quality.report.markdown import rebased
from quality.report.repeating import repeat
from quality.suites import MUST, RANKS

from tests.benchmarks.quality.report_records import cells, record, runs

COST = {"parameters_ratio": 2.0, "memory_ratio": 1.0, "step_ratio": 1.0, "step_ratio_quartiles": [1.0, 1.0]}
NOTES = "# Summary\n\nNaRA wins by a hair.\n\n# Failed\n\n* λ² as an input.\n"


@pytest.fixture
def files(tmp_path):
    where = {"commit": "abc123", "versions": {"torch": "2.13"}, "hardware": {"processor": "a CPU", "cores": 2}}
    records = [
        *runs("full", [0.6, 0.7], **where),
        *runs("lora", [1.0, 1.1], **where),
        *runs("nara", [0.9, 1.0], **where),
        *runs("nara", [1.0, 1.1], control="mean_core", **where),
        record("vera", 0, [1.5, 1.5], stage="single"),
        *runs("nara", [0.8, 0.9], stage="ablation", settings={"core_scale": 1.0}),
        record("nara", 0, [1, 1], stage="cost", **COST),
    ]
    for method in ("lora", "nara"):
        scores = {"similarity": 0.6, "text_alignment": 0.5}
        records += runs(method, [0.1, 0.2], suite="images", backbone="sdxl-tiny", domain="toy", **scores)
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (tmp_path / "notes.md").write_text(NOTES)
    return tmp_path


def report(folder, name="RESULTS.md"):
    main = import_module("report_quality").main
    return main([folder / "results.jsonl"], folder / "notes.md", folder / name)


def test_the_report_holds_all_sections_and_its_pictures(files):
    text = report(files)
    assert (files / "RESULTS.md").read_text() == text
    headings = [line for line in text.splitlines() if line.startswith("#")]
    for wanted in (
        "## Text: tiny, r = 4", "## Images: sdxl-tiny, r = 4", "### What had to be reached", "### Validation loss",
        "### Controls", "### Loss over the noise level", "### Cost", "### One seed", "### Ablations",
        "### Text alignment", "## What failed", "## How to repeat it",
    ):  # fmt: skip
        assert wanted in headings
    assert "NaRA wins by a hair." in text
    assert "* λ² as an input." in text
    assert "abc123" in text
    assert "--modality text --backbones tiny --set rank=4 --output outputs/quality/rank4/text.jsonl" in text
    assert "/text.jsonl --stages main single ablation cost\n" in text
    for picture in ("text-tiny-loss", "text-tiny-controls", "images-sdxl-tiny-loss"):
        assert f"(docs/results/{picture}.png)" in text
        assert (files / "docs" / "results" / f"{picture}.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_results_make_the_same_report(files):
    assert report(files) == report(files)
    first = (files / "docs" / "results" / "text-tiny-loss.png").read_bytes()
    report(files)
    assert (files / "docs" / "results" / "text-tiny-loss.png").read_bytes() == first


def test_it_can_be_made_without_notes_and_an_unknown_heading_is_refused(files, tmp_path):
    assert read_notes(tmp_path / "absent.md") == {}
    assert "## What failed" in report(files)
    assert "## What was learned" not in report(files)  # of which the notes say nothing
    assert read_notes(files / "notes.md") == {"summary": "NaRA wins by a hair.", "failed": "* λ² as an input."}
    (files / "notes.md").write_text("# Thoughts\n\nmany\n")
    with pytest.raises(
        ValueError, match=r"name no part of the report, thoughts: expected # summary, # setting, # text"
    ):
        read_notes(files / "notes.md")


def test_notes_may_say_how_a_suite_was_measured(files):
    (files / "notes.md").write_text("# Text\n\nBy hand.\n")
    text = report(files)
    assert "\n## Text: tiny, r = 4\n\nBy hand.\n" in text
    assert f"\n## Images: sdxl-tiny, r = 4\n\n{DESIGN['images']}\n" in text


def test_what_is_repeated_includes_variants_that_were_run():
    records = [record("nara", 0, [1, 1]), record("nara_centred", 0, [1, 1])]
    assert f"--stages main --methods {' '.join(MUST)} nara_centred\n" in repeat(records)[-1]
    assert "--methods" not in repeat(records[:1])[-1]


def test_what_is_repeated_names_a_rank_that_isnt_the_suites():
    usual = [record("full", 0, [1, 1], rank=None), record("lora", 0, [1, 1], rank=RANKS["text"])]
    assert "--backbones tiny --stages main\n" in repeat(usual)[-1]
    other = [record("full", 0, [1, 1], rank=None), record("lora", 0, [1, 1], rank=3)]
    assert (
        "--backbones tiny --set rank=3 --output outputs/quality/rank3/text.jsonl --stages main\n" in repeat(other)[-1]
    )
    assert "--results outputs/quality/rank3/*.jsonl --output outputs/quality/rank3/RESULTS.md" in repeat(other)[-1]
    files = "--results outputs/quality/rank3/*.jsonl outputs/quality/*.jsonl --output outputs/quality/RESULTS.md"
    images = record("lora", 0, [1, 1], suite="images", rank=RANKS["images"])
    assert files in repeat([*other, images])[-1]


def test_what_is_repeated_names_domains_of_tuning_and_seeds_that_arent_the_usual_ones():
    usual = [record("lora", 0, [1, 1], stage="tune", domain="commonsense", rank=1), *runs("lora", [1, 1], rank=1)]
    assert "--backbones tiny --stages tune main\n" in repeat(usual)[-1]
    others = [record("lora", 100, [1, 1], stage="tune", domain="code", rank=1), record("lora", 5, [1, 1], rank=1)]
    found = repeat(usual + others)[-1]
    assert "--backbones tiny --stages tune main --tune_domains commonsense code\n" in found
    assert "--backbones tiny --stages main --methods lora --seeds 5\n" in found


def test_the_setting_names_the_seeds_of_each_backbone():
    records = [*runs("lora", [1, 1]), *runs("lora", [1, 1, 1], backbone="small")]
    assert "* Text: tiny; code; 2 seeds (0 and 1); 2 records." in setting(records)[0]
    assert "* Text: small; code; 3 seeds (0, 1 and 2); 3 records." in setting(records)[0]


def test_methods_with_more_seeds_have_a_section_of_their_own_and_change_no_other():
    usual = [*runs("full", [0.6, 0.7]), *runs("lora", [1.0, 1.1]), *runs("nara", [0.9, 1.0001])]
    further = [record("lora", 7, [1.2, 1.2]), record("nara", 7, [1.0999, 1.0999])]
    with_more = more_seeds([*usual, *further], "text")
    assert with_more[:2] == [
        "### More seeds",
        "These methods have the seeds 7 as well. Here are all of theirs, the first ones too:",
    ]
    assert cells(with_more[3])["NaRA"][1].startswith("**−0.1000**")
    assert cells(with_more[3])["LoRA"][0] == "1.1000 ± 0.1000"
    assert "full fine-tuning" not in with_more[3]
    assert more_seeds(usual, "text") == []
    assert "2 seeds (0 and 1), 1 more of some methods (7); 8 records" in setting([*usual, *further])[0]


def test_the_tables_of_all_methods_leave_further_seeds_out(files):
    before = report(files)
    with (files / "results.jsonl").open("a") as file:
        for each in (record("lora", 7, [1.2, 1.2]), record("nara", 7, [1.1, 1.1])):
            file.write(json.dumps(each) + "\n")
    after = report(files)
    part = slice(after.index("### Validation loss"), after.index("### More seeds"))
    assert after[part].rstrip() in before
    assert 'By the seeds 0 and 1; "More seeds" below' in after
    assert "More seeds" not in before


def test_pictures_go_where_they_are_told_to(files):
    main = import_module("report_quality").main
    text = main([files / "results.jsonl"], files / "notes.md", files / "own" / "R.md", files / "own" / "pictures")
    assert "(pictures/text-tiny-loss.png)" in text
    assert (files / "own" / "pictures" / "text-tiny-loss.png").exists()


def test_other_results_dont_get_the_prose_of_the_committed_ones(files):
    main = import_module("report_quality").main
    text = main([files / "results.jsonl"], None, files / "R.md", files / "pictures")
    assert "## What was learned" not in text
    assert text.startswith("# Results\n\n## Setting\n\n* Text: tiny")


def test_links_of_notes_lead_to_the_same_file_from_another_folder(tmp_path):
    text = "[a](docs/a.md) ![b](b.png) [c](https://x.org/y) [d](#e) [f](/g)"
    assert rebased(text, tmp_path, tmp_path / "outputs" / "here") == (
        "[a](../../docs/a.md) ![b](../../b.png) [c](https://x.org/y) [d](#e) [f](/g)"
    )
    assert rebased(text, tmp_path, tmp_path) == text


def test_records_of_one_run_share_its_time():
    own = {**record("nara", 0, [1, 1]), "job": "a", "seconds": 1800.0}
    control = {**record("nara", 0, [1, 1], control="mean_core"), "job": "a", "seconds": 3600.0}
    assert hours([own, control, {**record("lora", 0, [1, 1]), "seconds": 3600.0}]) == 2.0
