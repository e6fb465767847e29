"""The report's tables on made-up results: every figure can be checked by hand."""

from quality.report.ablations import ablations_table, singles_table, tuning_table
from quality.report.cost import cost_table
from quality.report.data import Arm, Grid
from quality.report.markdown import percent, signed
from quality.report.names import LOSS, loss_of, ordered, title
from quality.report.tables import (
    bins_table,
    controls_table,
    domains_table,
    quality_table,
    resolution,
)

from tests.benchmarks.quality.report.records import cells, record, runs

# paired differences: full − LoRA −0.4, NaRA − LoRA −0.1, its controls − NaRA +0.06 and +0.1, all with a tiny spread
MAIN = [
    *runs("full", [0.6, 0.7001, 0.7999]),
    *runs("lora", [1.0, 1.1, 1.2]),
    *runs("dora", [1.0, 1.1, 1.2]),
    *runs("nara", [0.9, 1.0001, 1.0999]),
    *runs("nara", [0.96, 1.06, 1.16], control="constant"),
    *runs("nara", [1.0, 1.1, 1.2], control="mean_core"),
    *runs("multi_lora", [0.92, 1.02, 1.12]),
]


def test_quality_has_means_deviations_differences_and_the_gap():
    rows = cells(quality_table(Grid.of(MAIN), LOSS))
    assert rows["validation loss"] == ["code", "− LoRA", "− DoRA", "gap closed"]
    assert rows["LoRA"] == ["1.1000 ± 0.1000", "–", "–", "0 %"]
    assert rows["NaRA"] == ["1.0000 ± 0.1000", "**−0.1000** [−0.1002, −0.0998]", "–", "25 %"]
    assert rows["NaRA, trained with λ = 0.5"][-1] == "10 %"
    assert rows["full fine-tuning"][-1] == "100 %"
    assert list(rows)[1:5] == ["full fine-tuning", "LoRA", "DoRA", "NaRA"]


def test_several_domains_have_a_mean_and_doras_are_compared_with_dora():
    records = [
        *runs("lora", [1.0, 1.2]),
        *runs("lora", [3.0, 3.2], domain="arithmetic"),
        *runs("dora", [0.9, 1.1]),
        *runs("dora", [2.9, 3.1], domain="arithmetic"),
        *runs("nara_dora", [0.8, 1.0]),
        *runs("nara_dora", [2.8, 3.0], domain="arithmetic"),
    ]
    rows = cells(quality_table(Grid.of(records), LOSS))
    assert rows["validation loss"] == ["code", "arithmetic", "all", "− LoRA", "− DoRA"]
    assert rows["LoRA"][2] == "2.1000 ± 0.1414"
    assert rows["NaRA-DoRA"][3].startswith("**−0.2000**")
    assert rows["NaRA-DoRA"][4].startswith("**−0.1000**")
    assert rows["DoRA"][4] == "–"


def test_bins_are_compared_one_by_one():
    records = []
    for seed, shift in enumerate((0.0, 0.1, 0.2)):
        records += [record("lora", seed, [1 + shift, 2 + shift]), record("nara", seed, [0.9 + shift, 2 + 2 * shift])]
    rows = cells(bins_table(Grid.of(records)))
    assert rows["λ"] == ["0.25", "0.75"]
    assert rows["LoRA"] == ["1.1000 ± 0.1000", "2.1000 ± 0.1000"]
    assert rows["NaRA − LoRA"] == ["**−0.1000** ± 0.0000", "+0.1000 ± 0.2484"]  # 4.3027 · 0.1 / √3


def test_differences_stand_for_each_domain():
    records = [
        record(method, seed, [loss + 0.1 * seed] * 2, domain=domain, control=control)
        for domain, shift in (("code", 0.0), ("arithmetic", 0.25))
        for seed in range(3)
        for method, control, loss in (
            ("lora", None, 1.0),
            ("dora", None, 0.875),
            ("nara", None, 1.0 - shift),
            ("nara", "constant", 1.0),
            ("nara_dora", None, 1.0),
        )
    ]
    rows = cells(domains_table(Grid.of(records), LOSS))
    assert rows["validation loss, difference"] == ["code", "arithmetic"]
    assert "LoRA" not in rows
    zero = "0.0000 [0.0000, 0.0000]"
    assert rows["NaRA"] == [zero, "**−0.2500** [−0.2500, −0.2500]"]
    assert rows["NaRA, trained with λ = 0.5"] == [zero, "**+0.2500** [+0.2500, +0.2500]"]
    assert rows["DoRA"] == ["**−0.1250** [−0.1250, −0.1250]"] * 2
    assert rows["NaRA-DoRA"] == ["**+0.1250** [+0.1250, +0.1250]"] * 2


def test_a_mean_of_fewer_seeds_says_so():
    records = [*runs("lora", [1.0, 1.1, 1.2]), *runs("dora", [1.0, 1.1])]
    assert "DoRA (2 of 3 seeds)" in cells(quality_table(Grid.of(records), LOSS))


def test_a_difference_that_rounds_to_zero_isnt_bold_and_losses_of_images_have_more_digits():
    records = [*runs("lora", [1.0, 1.1, 1.2]), *runs("nara", [0.99999, 1.09999, 1.19999])]
    assert cells(quality_table(Grid.of(records), LOSS))["NaRA"][1] == "0.0000 [0.0000, 0.0000]"
    images = Grid.of([{**each, "suite": "images"} for each in records])
    assert cells(quality_table(images, loss_of("images")))["NaRA"][1] == "**−0.000010** [−0.000010, −0.000010]"


def test_cost_stands_beside_loras_of_the_same_process():
    own = {"step_ms": 50.4, "step_ratio": 2.0, "step_ratio_quartiles": [1.9, 2.104], "trainable_parameters": 2500}
    nara = record("nara", 0, [1, 1], stage="cost", parameters_ratio=2.5, memory_ratio=1.25, **own)
    lora = {**nara, "method": "lora", "step_ratio": 1.0}
    assert list(cells(cost_table([nara, lora])))[1:] == ["LoRA", "NaRA"]
    assert cells(cost_table([nara, lora]))["NaRA"] == ["2 500", "2.50", "50", "2.00 (1.90 to 2.10)", "1.25"]


def test_controls_stand_beside_their_method_and_its_baseline():
    rows = cells(controls_table(Grid.of(MAIN), LOSS) or "")
    assert list(rows)[1:] == ["NaRA, trained with λ = 0.5", "NaRA, evaluated with the mean of C(λ)"]
    constant, mean = list(rows.values())[1:]
    assert [each.split()[0] for each in constant[1:]] == ["**+0.0600**", "**−0.0400**"]
    assert [each.split()[0] for each in mean[1:]] == ["**+0.1000**", "0.0000"]
    assert controls_table(Grid.of(runs("lora", [1, 2])), LOSS) is None


def test_the_resolution_is_one_runs_error_beside_the_gap():
    assert "one run's loss, from the spread over validation samples, is 0.0250, 6% of the gap" in resolution(
        Grid.of(MAIN), "text"
    )
    without = [{name: value for name, value in record.items() if name != "validation_error"} for record in MAIN]
    assert resolution(Grid.of(without), "text").startswith("No run of LoRA")
    assert resolution(Grid.of(runs("lora", [1, 2])), "text").startswith("No run of LoRA")


def test_ablations_are_named_by_what_differs_from_the_main_runs():
    stage = {"stage": "ablation"}
    records = [
        *runs("nara", [0.8, 0.9], settings={"core_scale": 1.0}, **stage),
        *runs("nara", [0.95, 1.05], rank=8, **stage),
    ]
    rows = cells(ablations_table(records, MAIN))
    assert rows["NaRA: core_scale = 1"][:2] == ["2", "0.8500 ± 0.0707"]
    assert rows["NaRA: core_scale = 1"][3].startswith("**−0.2000**")
    assert rows["NaRA: rank = 8"][3].startswith("**−0.0500**")


def test_a_variation_that_lora_had_too_is_compared_with_lora_so_varied():
    stage = {"stage": "ablation", "rank": 8}
    rows = cells(ablations_table([*runs("nara", [0.8, 0.9], **stage), *runs("lora", [0.85, 0.951], **stage)], MAIN))
    assert list(rows)[1:] == ["LoRA: rank = 8", "NaRA: rank = 8"]
    assert rows["NaRA: rank = 8"][3] == "**−0.0505** [−0.0569, −0.0441] (rank = 8)"  # t₁ · 0.0005 = 0.00635
    assert rows["LoRA: rank = 8"][2].startswith("**−0.1495**")


def test_methods_of_one_seed_stand_beside_lora_on_that_seed():
    rows = cells(singles_table([record("vera", 1, [1.5, 1.5], stage="single")], MAIN))
    assert rows["VeRA"] == ["1.5000", "+0.4000"]
    assert rows["LoRA"] == ["1.1000", "–"]


def test_tuning_shows_all_trials_and_the_best():
    trial = {"stage": "tune"}
    records = [
        record("lora", 100, [2.0, 2.0], trial={"learning_rate": 0.1}, **trial),
        record("lora", 100, [1.0, 1.0], trial={"learning_rate": 0.01}, **trial),
        record("lora", 100, [2.0, 2.0], trial={"learning_rate": 0.01}, domain="arithmetic", **trial),
        {**record("lora", 100, [1.0, 1.0], trial={"learning_rate": 1.0}, **trial), "validation_loss": None},
    ]
    assert cells(tuning_table(records))["LoRA"] == ["0.1: 2.0000", "**0.01: 1.5000**", "1: diverged"]


def test_names_and_signs():
    assert title(Arm("multi_lora")) == "Multi-LoRA"
    assert title(Arm("nara_dora", "reversed")) == "NaRA-DoRA, evaluated with 1 − λ"
    assert title(Arm("nara_mine")) == "nara_mine"
    assert [arm.control for arm in ordered([Arm("nara", "reversed"), Arm("nara", "constant"), Arm("nara")])] == [
        None, "constant", "reversed",
    ]  # fmt: skip
    assert [signed(value, 2) for value in (-0.001, 0.5, -0.5)] == ["0.00", "+0.50", "−0.50"]
    assert [percent(value) for value in (-0.001, -0.2, 1.5)] == ["0 %", "−20 %", "150 %"]
