"""What benchmark_alternatives.py compares NaRA with: Bayes' rule by enumeration, λ as a token, and its records."""

import benchmark_alternatives as alternatives
import pytest
import report_quality
import torch
from quality import results
from quality.regimes.runs import REGIMES
from quality.regimes.text.corruption import REPLACED, noise_tokens
from quality.regimes.text.data import open_data
from quality.regimes.text.models import load
from quality.report.blocks import block

RECORDS = report_quality.RESULTS / "alternatives.jsonl"


@pytest.fixture(scope="module")
def batches():
    return list(REGIMES["blind_open"].held_out())


def characters():
    return load("uniform-tiny")[1]("abcdefghijklmnopqrstuvwxyz0123456789", add_special_tokens=False)["input_ids"]


def test_bayes_rule_is_that_of_all_characters_and_tokens_of_the_noise(batches):
    batch = batches[4]
    noise = noise_tokens(load("uniform-tiny")[1]).tolist()
    found = alternatives.bayes_losses(batch)
    for row in range(5):
        level = batch.noise_level[row].item()
        kept = {(x, z): (1 - level) * (x == z) + level / len(noise) for x in characters() for z in noise}  # p(z | x)
        places = batch.answer[row].nonzero()[:, 0].tolist()
        for place in places[:-1]:
            x, z = batch.targets[row, place].item(), batch.input_ids[row, place].item()
            p = kept[x, z] / sum(kept[other, z] for other in characters())
            assert found[row, place].exp().item() == pytest.approx(1 / p, rel=1e-6)
        assert found[row, places[-1]] == 0  # the end, which no answer lacks


@pytest.mark.parametrize(("is_told", "score"), [(True, "1.977"), (False, "2.078")])
def test_bayes_rule_has_on_the_held_out_questions_what_the_record_says(batches, is_told, score):
    losses = [alternatives.bayes_losses(batch, is_told)[batch.answer].mean().item() for batch in batches]
    title = "Bayes' rule, told λ" if is_told else "Bayes' rule, not told λ"
    (record,) = (each for each in results.read(RECORDS) if each["arm"] == title)
    assert losses == pytest.approx(record["losses"], rel=1e-5)
    assert f"{sum(losses) / 10:.3f}" == score


def test_the_token_says_tenths_of_the_noise_level_in_place_of_the_first_digit():
    rows, level = open_data().held_out, torch.tensor([0.04, 0.31, 0.999, 1.0])
    options = {"seed": 3, "sample_indices": range(4), "noise_level": level}
    ways = (REPLACED.corrupt, alternatives.told)
    untold, told = (corrupt(rows.batch(torch.arange(4)), **options) for corrupt in ways)
    tokenizer = load("uniform-tiny")[1]
    for row, digit in enumerate("0399"):
        before, after = (tokenizer.decode(batch.input_ids[row]) for batch in (untold, told))
        first = before.index("code ") + len("code ")
        assert after == before[:first] + digit + before[first + 1 :]
    for name in ("targets", "masked", "answer", "noise_level", "attention_mask"):
        assert torch.equal(getattr(told, name), getattr(untold, name)), name


def test_each_regime_has_its_alternatives_among_the_committed_records():
    lines = block("alternatives", report_quality.RESULTS).splitlines()
    assert lines[0] == "| regime | method | parameters | rate | seed 20 | seed 21 |"
    rows = {tuple(line.strip("| ").split(" | ")[:2]): line.strip("| ").split(" | ")[4:] for line in lines[2:]}
    trained = {(arm.regime, arm.title) for arm in alternatives.trained(200)}
    assert set(rows) == trained | set(alternatives.UNTRAINED)
    assert all(float(score) for scores in rows.values() for score in scores)
    for regime in ("eps_to_v", "zero_snr"):  # nothing trained on attention reaches what needs no training
        identity, nara = (rows[regime, title] for title in ("the base, read by the identity", "NaRA, r 4"))
        assert max(map(float, identity)) < min(map(float, nara))
