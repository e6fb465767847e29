import pytest
from quality.jobs import Job
from quality.tuning import Untuned, tuned

TRIALS = ({"learning_rate": 1e-2, "core_learning_rate": 1e-3}, {"learning_rate": 2e-2, "core_learning_rate": 1e-3})


def trial(number, loss, domain="code", backbone="a", method="nara", **changes):
    record = {"suite": "text", "stage": "tune", "backbone": backbone, "domain": domain, "method": method}
    return record | {"trial": dict(TRIALS[number]), "validation_loss": loss} | changes


def job(backbone="a", method="nara"):
    return Job("text", "main", backbone, "code", method, None, 0)


def test_the_trial_with_the_lowest_mean_loss_over_domains_is_chosen():
    records = [trial(0, 1.0), trial(1, 1.4), trial(0, 2.0, "arithmetic"), trial(1, 1.5, "arithmetic")]
    assert tuned(records, job(), TRIALS) == TRIALS[1]
    assert tuned(records[:2], job(), TRIALS) == TRIALS[0]


def test_other_methods_suites_and_stages_have_no_say():
    others = [
        trial(1, 0.1, method="lora"),
        trial(1, 0.1, suite="images"),
        trial(1, 0.1, stage="main"),
        trial(1, 0.1, backbone="b"),
    ]
    assert tuned([trial(0, 1.0), trial(1, 1.4), *others], job(), TRIALS) == TRIALS[0]


def test_a_backbone_without_trials_of_its_own_takes_those_of_the_others():
    records = [trial(0, 1.0), trial(1, 0.5)]
    assert tuned(records, job("b"), TRIALS) == TRIALS[1]


def test_a_trial_that_diverged_is_never_chosen():
    assert tuned([trial(0, None), trial(1, 9.0)], job(), TRIALS) == TRIALS[1]
    with pytest.raises(Untuned, match="every trial of nara on a diverged"):
        tuned([trial(0, None), trial(1, None)], job(), TRIALS)


def test_missing_trials_are_named():
    with pytest.raises(Untuned, match="nara isn't tuned on a, it lacks all trials: run --stages tune"):
        tuned([], job(), TRIALS)
    with pytest.raises(Untuned, match="it lacks arithmetic on a"):
        tuned([trial(0, 1.0), trial(1, 1.0), trial(0, 1.0, "arithmetic")], job(), TRIALS)
