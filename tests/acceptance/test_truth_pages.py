"""Every page rounds a figure of a regime once, from the records: tables and prose print the same digits.

A number in prose that has no sign is taken for a figure of a regime if it lies within 1.5 units of its last digit:
one that is then no figure's rounding was rounded wrongly.
Tables between marks, and results/regimes.md from its first table on, are made from the records, by other tests.
"""

from __future__ import annotations

import re
from collections import defaultdict
from statistics import fmean

import pytest
import report_quality
from quality import results
from quality.images.held_out import base
from quality.regimes import runs
from quality.regimes.text.bayes import bayes_losses
from quality.regimes.text.corruption import noise_tokens
from quality.results import read
from quality.text.runs import load

ROOT = report_quality.ROOT
PLAN = "examples/benchmarks/results/regimes_plan.md"  # fixed before the records were there
FOLDERS = ("*.md", "docs/**/*.md", "examples/check/*.md", "examples/benchmarks/**/*.md")
PAGES = {page.relative_to(ROOT).as_posix() for folder in FOLDERS for page in ROOT.glob(folder)} - {PLAN}
REGIMES = {
    "eps_to_v": r"eps_to_v|ε → v",
    "zero_snr": r"zero_snr|zero terminal SNR",
    "eps_to_flow": r"eps_to_flow|ε → flow",
    "blind_open": r"blind_open|[Bb]lind text[, (]|random tokens in place of masks",
    "blind_determined": r"blind_determined|[Bb]lind text whose",
    "subject_low": r"subject_low|λ < 0\.5|some λ alone",
    "subject_high": r"subject_high|λ ≥ 0\.5",
    "two_conditions": r"two_conditions|[Tt]wo conditions|do two things",
    "one_image": r"one_image|[Oo]ne image",
    "seen_determined": r"seen_determined|shows its masks",
    "seen_open": r"seen_open|leaves open",
    "noise_offset": r"noise_offset|noise offset",
}
"""{regime: how a paragraph names it}; a paragraph that names none is about those of the one before, up to a heading."""
NUMBER = r"(?<![\d.\w+−])(?<!± )(?P<number>\d?\.\d{3,5})(?![\d%]| %)"
MEASURES = ("score", "inside", "drift", "alignment")


@pytest.fixture(scope="module")
def figures():
    """{(regime, method): its figures}: means over ten confirmation seeds; of two earlier ones each and both."""
    values = defaultdict(list)  # of each seed
    for record in read(report_quality.RESULTS / "regimes.jsonl"):
        cell = [record[name] for name in ("targets", "rank", "steps")]
        for method, measured in ((record["arm"], record), ("mean of C", record.get("mean_core", {}))):
            for measure in MEASURES:
                if record["stage"] == "confirm" and measure in measured:
                    values[(record["regime"], method, record["arm"], measure, *cell)].append(measured[measure])
    for record in read(report_quality.RESULTS / "alternatives.jsonl"):
        regime = re.sub("_(told|read|bias|gain)$", "", record["regime"])
        cell = [record.get(name) for name in ("targets", "rank", "steps")]
        for seed in {"confirm": ["ten seeds"], "alternatives": [record["seed"], "both seeds"]}.get(record["stage"], []):
            values[(regime, record["arm"], record["regime"], seed, *cell)].append(record["score"])
    by_regime = defaultdict(list)
    for (regime, method, *_), losses in values.items():
        if None not in losses:
            by_regime[regime, method].append(fmean(losses))
    return by_regime


def paragraphs(text):
    """(regimes, paragraph) of what people wrote; a row of a table is a paragraph of its own."""
    text = re.sub(r"(?s)<!-- table:.*?<!-- end of table -->", "", text).partition("\n### eps_to_v: ")[0]
    named_above = []
    for paragraph in re.split(r"\n\s*\n|\n(?=\|)|\n(?=[*-] )", text):
        named = [regime for regime, pattern in REGIMES.items() if re.search(pattern, paragraph)]
        named_above = named or ([] if paragraph.startswith(("#", "|")) else named_above)
        yield named_above, " ".join(paragraph.split())


def is_wrong(number, known):
    """Whether `number` is close to one of `known`, and the rounding of none."""
    digits = len(number.partition(".")[2])
    if any(f"{value:.{digits}f}".removeprefix("0") == number.removeprefix("0") for value in known):
        return False
    return any(abs(value - float(number)) < 1.5 * 10**-digits for value in known)


def mistakes(text, figures):
    """The numbers in `text` that are rounded wrongly."""
    wrong = set()
    for regimes, paragraph in paragraphs(text):
        true_values = [value for (regime, _), values in figures.items() if regime in regimes for value in values]
        wrong |= {match["number"] for match in re.finditer(NUMBER, paragraph) if is_wrong(match["number"], true_values)}
    return wrong


def test_prose_has_the_digits_of_the_records(figures):
    wrong = {page: mistakes((ROOT / page).read_text(encoding="utf-8"), figures) for page in sorted(PAGES)}
    assert {page: numbers for page, numbers in wrong.items() if numbers} == {}


@pytest.mark.parametrize("page", ["images", "text", "rank4"])
def test_prose_has_the_digits_of_its_pages_tables(page):
    """Of ordinary fine-tuning. A wrong digit is found where no other figure of the page happens to have it."""
    text = (report_quality.RESULTS / f"{page}.md").read_text(encoding="utf-8")
    parts = re.split(r"(?s)<!-- table:(.*?)<!-- end of table -->", text)  # prose, table, prose, …
    prose, tables = "".join(parts[::2]), "".join(parts[1::2])
    number = r"(?<![\d.\w])\d\.\d{3,6}(?!\d)"
    in_tables = re.findall(number, tables)
    for digits in re.findall(number, prose):
        assert not is_wrong(digits, [float(value) for value in in_tables if len(value) >= len(digits)]), digits


def test_a_wrong_rounding_is_found(figures):
    """Of every regime whose records are whole."""
    assert f"{figures['subject_low', 'lora_params'][0]:.5f}" == "0.88247"
    regimes = REGIMES.keys() - {"one_image", "noise_offset"}
    assert all(figures[regime, method] for regime in regimes for method in ("lora", "nara"))
    for text, wrong in [
        ("**zero_snr.** LoRA 0.425, DoRA 0.437", set()),
        ("**zero_snr.** LoRA 0.426, DoRA 0.437", {"0.426"}),
        ("v at zero terminal SNR.\n\nThere, NaRA 0.195 is below LoRA (.202).", {".202"}),
        ("ε → v: NaRA 0.326.\n\n# Something else\n\nNaRA 0.327", set()),
    ]:
        assert mistakes(text, figures) == wrong


RECORDS = report_quality.RESULTS / "alternatives.jsonl"


@pytest.fixture(scope="module")
def batches():
    return list(runs.REGIMES["blind_open"].held_out())


def characters():
    return load("uniform-tiny")[1]("abcdefghijklmnopqrstuvwxyz0123456789", add_special_tokens=False)["input_ids"]


@pytest.mark.slow
def test_bayes_rule_covers_all_characters_and_noise_tokens(batches):
    batch = batches[4]
    noise = noise_tokens(load("uniform-tiny")[1]).tolist()
    actual = bayes_losses(batch)
    for row in range(5):
        level = batch.noise_level[row].item()
        likelihoods = {
            (x, z): (1 - level) * (x == z) + level / len(noise) for x in characters() for z in noise
        }  # p(z | x)
        places = batch.answer[row].nonzero()[:, 0].tolist()
        for place in places[:-1]:
            x, z = batch.targets[row, place].item(), batch.input_ids[row, place].item()
            p = likelihoods[x, z] / sum(likelihoods[other, z] for other in characters())
            assert actual[row, place].exp().item() == pytest.approx(1 / p, rel=1e-6)
        assert actual[row, places[-1]] == 0  # the end, which no answer lacks


@pytest.mark.slow
@pytest.mark.parametrize(("knows_level", "score"), [(True, "1.977"), (False, "2.078")])
def test_bayes_rule_matches_the_record_on_validation_questions(batches, knows_level, score):
    losses = [bayes_losses(batch, knows_level)[batch.answer].mean().item() for batch in batches]
    title = "Bayes' rule, told λ" if knows_level else "Bayes' rule, not told λ"
    (record,) = (line for line in results.read(RECORDS) if line["arm"] == title)
    assert losses == pytest.approx(record["losses"], rel=1e-5)
    assert f"{sum(losses) / 10:.3f}" == score


@pytest.mark.slow
@pytest.mark.parametrize("regime", ["eps_to_v", "zero_snr", "eps_to_flow"])
def test_base_read_by_identity_matches_the_record(regime):
    read = runs.FURTHER[f"{regime}_read"]
    (record,) = (line for line in results.read(RECORDS) if line["regime"] == regime and line["seed"] is None)
    assert read.figures(base().pipe.unet)["losses"] == pytest.approx(record["losses"], rel=1e-4)
