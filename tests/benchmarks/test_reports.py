"""Tables and pictures come from the committed records, and pages show the tables that the records make."""

from __future__ import annotations

import pytest
import report_quality
from quality import results
from quality.regimes import runs
from quality.regimes.alternatives import GROUPS, RECORDS, SEEDS, Arm, Group, confirmed
from quality.regimes.plan import PLAN, cell_of
from quality.regimes.report import report, summary
from quality.regimes.runs import ARMS, Cell, Run, build, record_of, trainable_parameters


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


# ---------------------------------------------------------------------- the alternatives

REGIMES = runs.REGIMES | runs.FURTHER


def counted(regime, targets, rank, arm):
    backbone = REGIMES[regime].backbone
    options = {"rank": rank, "target_modules": list(backbone.targets[targets])}
    return trainable_parameters(build(arm, backbone.arguments(ARMS[arm].method, 0, options), backbone))


@pytest.mark.parametrize(
    ("regime", "targets", "static", "rank", "knots"),
    [
        ("eps_to_v", "attention_time", "lora", 14, 11),
        ("noise_offset", "attention_time", "dora", 14, 11),
        ("blind_open", "attention", "lora", 43, 27),
    ],
)
def test_ranks_at_equal_parameters_are_the_smallest(regime, targets, static, rank, knots):
    nara = counted(regime, targets, 4, "nara")
    assert counted(regime, targets, rank - 1, static) < nara <= counted(regime, targets, rank, static)
    assert counted(regime, targets, knots, "nara_knots") <= counted(regime, targets, rank, static)
    arms = {(arm.cell.rank, arm.arm) for group in GROUPS if group.regime == regime for arm in group.arms.values()}
    assert {(rank, static), (knots, "nara_knots"), (4, "nara")} <= arms


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


def test_a_group_is_whole_with_ten_seeds_and_its_differences_are_paired():
    arms = {name: Arm(Cell("eps_to_v", name, 4, 200), "lora") for name in ("attention", "all")}
    group, records = Group("new", "", "eps_to_v", arms, []), []
    for seed in range(300, 310):
        one = {"regime": "eps_to_v", "rank": 4, "steps": 200, "arm": "lora", "stage": "confirm", "seed": seed}
        records += [
            one | {"targets": "attention", "score": seed},
            one | {"targets": "all", "score": seed + 1 + seed % 2},
        ]
    assert not confirmed(group, records[:-1]).is_whole
    assert confirmed(group, records).is_whole
    found = confirmed(group, records).difference("attention", "all")
    assert found.mean == pytest.approx(-1.5)
    assert found.high - found.mean == pytest.approx(2.262157 * (10 / 9) ** 0.5 * 0.5 / 10**0.5)
