"""The verdict of the confirmation seeds, against differences and Student's t by hand."""

import math

import pytest
import report_quality
from quality import results
from quality.regimes.equal_similarity import table
from quality.regimes.plan import CONFIRM, CONFIRM_SEEDS, PLAN, Planned
from quality.regimes.report import conditions, confirmed, report
from quality.regimes.runs import Cell, Run
from quality.regimes.summary import summary

ARMS = ("lora", "lora_params", "dora", "nara", "nara_constant", "nara_shuffled")
PLANNED = Planned(Cell("eps_to_v", "attention", 4, 200), ARMS)
WINDOWED = Planned(Cell("subject_low", "attention", 4, 200), (*ARMS, "lora_gated", "lora_gated_samples", "nara_gated"))
GAIN = {"nara": 0.05, "nara_gated": 0.2}


def records(planned=PLANNED, seeds=CONFIRM_SEEDS):
    """NaRA is better by 0.05 and a little that depends on the seed; all else is as LoRA is."""
    return [_record(planned, arm, seed) for seed in seeds for arm in planned.arms]


def _record(planned, arm, seed):
    score = 0.4 + 0.01 * seed - GAIN.get(arm, 0) + 0.001 * (seed % 3) * (arm == "nara")
    found = {"stage": CONFIRM, **Run(planned.cell, arm, seed, {"learning_rate": 1.0}).named, "trainable_parameters": 9}
    found |= {"score": score, "losses": [score + bin for bin in range(10)], "drifts": [score / 2] * 10}
    if arm == "nara":
        found["mean_core"] = {"score": score + 0.1, "losses": [score + 0.1 + bin for bin in range(10)]}
        found["mean_core"]["drifts"] = [score] * 10
    return found


def test_a_difference_is_paired_over_seeds_with_students_interval():
    found = confirmed(PLANNED, records()).difference("nara", "lora")
    values = [-0.05 + 0.001 * (seed % 3) for seed in CONFIRM_SEEDS]
    mean = sum(values) / 10
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / 9)
    assert found.mean == pytest.approx(mean)
    assert found.high - found.mean == pytest.approx(2.262157 * deviation / math.sqrt(10), rel=1e-5)


def test_all_conditions_are_met_where_they_are():
    found = conditions(confirmed(PLANNED, records()), "nara")
    assert found == dict.fromkeys(
        (
            "below lora",
            "below lora_params",
            "below dora",
            "below lora in every bin",
            "nara_constant is worse",
            "nara_shuffled is worse",
            "nara mean_core is worse",
        ),
        True,
    )


@pytest.mark.parametrize(
    ("arm", "change", "failed"),
    [
        ("lora_params", lambda r: r | {"score": r["score"] - 0.06}, "below lora_params"),
        ("dora", lambda r: r | {"score": r["score"] - 0.1 * (r["seed"] % 2)}, "below dora"),
        ("nara_shuffled", lambda r: r | {"score": r["score"] - 0.05}, "nara_shuffled is worse"),
        ("nara", lambda r: r | {"mean_core": r["mean_core"] | {"score": r["score"]}}, "nara mean_core is worse"),
        ("nara", lambda r: r | {"losses": [*r["losses"][:9], r["losses"][9] + 1]}, "below lora in every bin"),
    ],
)
def test_a_condition_that_is_not_met_is_named(arm, change, failed):
    changed = [change(each) if each["arm"] == arm else each for each in records()]
    found = conditions(confirmed(PLANNED, changed), "nara")
    assert [name for name, met in found.items() if not met] == [failed]


def test_a_windowed_regime_is_judged_against_the_gate_and_by_drift_outside():
    found = conditions(confirmed(WINDOWED, records(WINDOWED)), "nara")
    assert found["below lora_gated"] is True
    assert found["below lora_gated_samples"] is True
    assert found["below lora in every bin"] is True
    worse = lambda r: r | {"drifts": [*r["drifts"][:9], 9.0]} if r["arm"] == "nara" else r  # noqa: E731
    assert conditions(confirmed(WINDOWED, map(worse, records(WINDOWED))), "nara")["below lora in every bin"] is False
    unused = lambda r: r | {"losses": [*r["losses"][:9], 99.0]} if r["arm"] == "nara" else r  # noqa: E731
    assert conditions(confirmed(WINDOWED, map(unused, records(WINDOWED))), "nara")["below lora in every bin"] is True


def test_a_cell_that_does_not_decide_its_regime_is_judged_by_what_it_has():
    wider = Planned(Cell("eps_to_v", "all", 4, 200), ("lora", "lora_params", "nara"))
    assert list(conditions(confirmed(wider, records(wider)), "nara")) == [
        "below lora",
        "below lora_params",
        "below lora in every bin",
        "nara mean_core is worse",
    ]
    text = report([wider], records(wider))
    assert "**nara:** below lora: yes; below lora_params: yes;" in text
    assert "wins" not in text


def test_one_image_is_judged_by_t_lora_and_the_lora_of_less_noise_and_by_no_bins():
    arms = ("lora", "lora_params", "tlora", "lora_less_noisy", "nara", "nara_constant", "nara_shuffled")
    cell = confirmed(planned := Planned(Cell("one_image", "attention", 16, 400), arms), records(planned))
    below, worse = [arm for arm in arms if not arm.startswith("nara")], ["nara_constant", "nara_shuffled"]
    assert list(conditions(cell, "nara")) == [*(f"below {a}" for a in below), *(f"{a} is worse" for a in worse)]
    assert all(conditions(cell, "nara").values())


def test_runs_that_are_missing_or_diverged_leave_a_condition_open():
    diverged = [r | {"score": None, "losses": None} if (r["arm"], r["seed"]) == ("dora", 203) else r for r in records()]
    assert conditions(confirmed(PLANNED, diverged), "nara")["below dora"] is None
    missing = [each for each in records() if each["arm"] != "nara_constant"]
    assert conditions(confirmed(PLANNED, missing), "nara")["nara_constant is worse"] is None


def test_report_has_a_section_for_each_cell_with_runs_and_none_for_development():
    text = report([PLANNED, WINDOWED], records())
    assert text.count("###") == 1
    assert "### eps_to_v: attention, rank 4, 200 steps (10 seeds)" in text
    assert "| nara mean_core |" in text
    assert "**nara wins: yes.** below lora: yes;" in text
    development = [each | {"stage": "dev"} for each in records()]
    assert report(PLAN, development) == "No confirmation run is there yet."


def test_report_of_samples_is_paired_as_scores_are():
    def drawn(each):
        better = 0.1 * (each["arm"] == "nara")
        return each | {"alignment": 0.01 * (each["seed"] % 10) + better, "retrieval": 0.5}

    text = report([PLANNED], [drawn(each) for each in records()])
    assert "| nara | 0.145 ± 0.030 | **+0.100** ± 0.000 | 0.500 ± 0.000 | 0.000 ± 0.000 |" in text
    assert "| lora | 0.045 ± 0.030 | – | 0.500 ± 0.000 | – |" in text
    assert text.count("| nara mean_core |") == 1  # of which nothing was drawn
    assert "| samples |" not in report([PLANNED], records())


def test_report_of_a_cell_without_all_its_runs_says_no_figure():
    text = report([PLANNED], records()[:-1])
    assert text == (
        "### eps_to_v: attention, rank 4, 200 steps (10 seeds)\n\n"
        "59 of 60 runs are there; nothing is said before all are."
    )


def test_arms_that_came_later_have_a_section_of_their_own_beside_nara():
    later = Planned(PLANNED.cell, ("nara_diagonal",), label="eps_to_v_diagonal")
    assert "eps_to_v_diagonal" not in report([PLANNED, later], records())
    text = report([PLANNED, later], [*records(), *records(later)])
    assert text.count("###") == 2
    assert "| nara_diagonal | 9 | 2.4450 ± 0.0303 | 0.0000 ± 0.0000 | 0 |" in text
    assert text.endswith("**nara_diagonal less nara:** **+0.0489** ± 0.0006.")
    assert summary([PLANNED, later], [*records(), *records(later)]).count("eps_to_v") == 1


def test_the_page_of_results_is_what_the_records_say():
    """Made again by `benchmark_regimes.py --report`, and RESULTS.md by `report_quality.py`."""
    root = report_quality.ROOT
    page = (root / "docs" / "results" / "regimes.md").read_text(encoding="utf-8")
    assert page.endswith("\n\n" + report(PLAN, results.read(report_quality.RESULTS / "regimes.jsonl")) + "\n")
    assert report_quality.filled(root / "RESULTS.md") == (root / "RESULTS.md").read_text(encoding="utf-8")


def test_summary_has_a_row_for_each_whole_cell_and_names_who_won():
    assert summary([PLANNED], records()[:-1]) == "No regime's confirmation is whole yet."
    row = summary([PLANNED], records()).splitlines()[2].strip("| ").split(" | ")
    # 0.4 + 0.01 · 204.5 = 2.445; NaRA is 0.05 − 0.001 · 1.1 below; knots and all weights aren't in this plan
    assert row == ["eps_to_v", *["2.445"] * 3, "2.396", "2.445", "–", "–", "**−0.0489** ± 0.0006", "NaRA"]
    worse = [{**each, "score": each["score"] + 0.06} if each["arm"] == "nara" else each for each in records()]
    assert summary([PLANNED], worse).endswith("| none |")
    wider = Planned(Cell("eps_to_v", "all", 1, 200), ARMS)
    row = summary([wider], records(wider)).splitlines()[2]
    assert row.startswith("| eps_to_v, all, rank 1, 200 steps | ")
    assert row.endswith(" | – |")  # another cell decides the regime


FOUR = ("nara", "lora", "lora_params", "dora")


@pytest.mark.parametrize(
    ("page", "regime", "line", "arms"),
    [
        ("README.md", "eps_to_v", "| to sample an ε-model as a v-model", ("nara", "lora")),
        ("README.md", "zero_snr", "| to sample an ε-model as a v-model", ("nara",)),
        ("README.md", "eps_to_flow", "| to sample an ε-model as a v-model", ("nara",)),
        ("RESULTS.md", "eps_to_v", "**ε → v (eps_to_v).**", FOUR),
        ("RESULTS.md", "zero_snr", "**Zero terminal SNR (zero_snr).**", FOUR),
        ("RESULTS.md", "eps_to_flow", "**ε → flow (eps_to_flow): not won.**", FOUR),
        ("RESULTS.md", "blind_open", "**Blind text (blind_open).**", FOUR),
        (
            "RESULTS.md",
            "blind_determined",
            "**… whose answers the prompt determines (blind_determined): not won.**",
            FOUR,
        ),
    ],
)
def test_what_the_first_pages_say_of_a_regime_is_what_the_records_say(page, regime, line, arms):
    """Their words are written by hand."""
    (planned,) = (each for each in PLAN if each.name == regime)
    cell = confirmed(planned, results.read(report_quality.RESULTS / "regimes.jsonl"))
    text = (report_quality.ROOT / page).read_text(encoding="utf-8")
    paragraph = text[text.index(line) :].split("\n" if page == "README.md" else "\n\n")[0]
    for arm in arms:
        assert f"{cell.score(arm).mean:.3f}" in paragraph, arm


def test_alignment_at_equal_similarity_is_paired_over_the_seeds_in_which_both_reach_it():
    def looks(*pairs):
        return [{"step": 40 * i, "similarity": s, "alignment": a} for i, (s, a) in enumerate(pairs)]

    found = {("lora", seed): looks((0.4, 0.5), (0.6, 0.2)) for seed in range(5)}
    found |= {("nara", seed): looks((0.39, 0.6), (0.37, 0.55), (0.5, 0.25)) for seed in range(4)}
    found |= {("nara", 4): looks((0.38, 0.7)), ("lora", 5): looks((0.1, 0.9)), ("nara", 6): looks((0.44, 0.3))}
    lines = table(found, ["lora", "nara"]).splitlines()
    assert lines[0].split(" | ")[1:] == ["0.36", "0.38", "0.44", "0.47", "0.50 |"]
    assert lines[2] == "| lora | – (5) | – (5) | – (5) | – (5) | – (5) |"
    half = 2.776445 * 0.1 / math.sqrt(5) * math.sqrt(0.2)  # of 0.1 four times and 0.2
    assert lines[3] == f"| nara | **+0.120** ± {half:.3f} (6) | **+0.120** ± {half:.3f} (6) | – (5) | – (4) | – (4) |"
