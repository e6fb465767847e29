import copy
from collections import Counter

import pytest
from quality.jobs import Job, finished, shard
from quality.planning import Selection, jobs_of
from quality.suites import MUST, load_suite
from quality.text.methods import adapted
from quality.text.recipe import Recipe
from quality.variants import VARIANTS, is_noise_aware

from nara_diffusion.training.adapters.methods import METHODS


def selection(suite, **changes):
    values = {
        "backbones": suite.backbones,
        "domains": suite.domains,
        "methods": MUST,
        "others": suite.others,
        "tune_domains": suite.tune_domains,
        "seeds": (0, 1, 2, 3, 4),
    }
    return Selection(**values | changes)


@pytest.mark.parametrize("name", ["text", "images"])
def test_every_method_has_equally_many_trials_and_no_two_alike(name):
    suite = load_suite(name)
    trials = {method: suite.trials(method) for method in (*suite.methods, *VARIANTS)}
    number = {"text": 7, "images": 5}[name]
    assert {len(trials[method]) for method in (*MUST, *VARIANTS)} == {number}
    assert {len(trials[method]) for method in suite.others} == {5}
    for method, each in trials.items():
        assert len({tuple(sorted(trial.items())) for trial in each}) == len(each), method


def test_text_has_every_method_of_the_train_scripts():
    assert {*load_suite("text").methods, *VARIANTS} >= set(METHODS)


@pytest.mark.parametrize("name", ["text", "images"])
def test_main_runs_all_methods_and_the_controls_of_the_noise_aware_ones_for_each_seed(name):
    suite = load_suite(name)
    jobs = jobs_of(suite, "main", selection(suite, settings={"rank": 3}))
    places = len(suite.backbones) * len(suite.domains)
    assert len(jobs) == len({job.key for job in jobs}) == 5 * places * (len(MUST) + 6)
    assert [job.seed for job in jobs] == sorted(job.seed for job in jobs)  # seed after seed
    for method in ("nara", "nara_dora", "nara_knots"):
        assert Counter(job.control for job in jobs if job.method == method) == dict.fromkeys(
            [None, "constant", "shuffled"], 5 * places
        )
    assert {job.control for job in jobs if not is_noise_aware(job.method)} == {None}
    assert all(job.settings == {"rank": 3} for job in jobs)


def test_a_variant_has_both_controls_without_being_named_for_it():
    suite = load_suite("text")
    jobs = jobs_of(suite, "main", selection(suite, methods=("nara_knots_dora",), seeds=(0,), domains=("code",)))
    assert {job.control for job in jobs} == {None, "constant", "shuffled"}


def test_tuning_has_a_seed_of_its_own():
    suite = load_suite("text")
    jobs = jobs_of(suite, "tune", selection(suite, methods=("nara",), others=(), tune_domains=("code",)))
    assert {job.seed for job in jobs} == {100}
    assert [dict(job.settings) for job in jobs[:7]] == [dict(trial) for trial in suite.trials("nara")]
    assert {(job.backbone, job.domain) for job in jobs} == {(name, "code") for name in suite.backbones}


def test_others_run_once_and_ablations_on_three_seeds():
    suite = load_suite("text")
    single = jobs_of(suite, "single", selection(suite, backbones=("llada-tiny",), domains=("code",)))
    assert [(job.method, job.seed) for job in single] == [(method, 0) for method in suite.others]
    ablations = jobs_of(suite, "ablation", selection(suite))
    assert {job.seed for job in ablations} == {0, 1, 2}
    assert {(job.backbone, job.domain) for job in ablations} == {(suite.backbones[0], suite.ablation_domain)}
    ranks = {(job.method, job.settings["rank"]) for job in ablations if "rank" in job.settings}
    assert {rank for method, rank in ranks if method == "lora"} == {rank for method, rank in ranks if method == "nara"}
    few = jobs_of(suite, "ablation", selection(suite, methods=("full", "lora")))
    assert {job.method for job in few} == {"lora"}


def test_every_ablation_of_text_is_a_model_that_can_be_built(task):
    for method, settings in load_suite("text").ablations:
        recipe = Recipe.of(**settings)
        model = adapted(copy.deepcopy(task.model), method, recipe)
        config = model.peft_config["default"]
        for name, value in recipe.adapter.items():
            assert getattr(config, name) == value


def test_every_variant_is_a_nara_that_can_be_built(task):
    for name, (method, settings) in VARIANTS.items():
        assert is_noise_aware(name)
        adapted(copy.deepcopy(task.model), method, Recipe.of(**settings))


def test_shards_share_the_work_without_overlap():
    jobs = [Job("text", "main", "a", "b", "nara", None, seed) for seed in range(7)]
    parts = [shard(jobs, f"{k}/3") for k in range(3)]
    assert sorted(job.seed for part in parts for job in part) == list(range(7))
    for wrong in ("3/3", "1", "a/2", "1/0", "-1/2"):
        with pytest.raises(ValueError, match="expected k/N with k from 0 to N - 1"):
            shard(jobs, wrong)


def test_a_job_is_finished_when_its_last_record_is_there():
    job = Job("text", "main", "a", "b", "nara", None, 0, {"rank": 2})
    first, last = {"job": job.key, "last": False}, {"job": job.key, "last": True}
    assert finished([first]) == set()
    assert finished([first, last]) == {job.key}
    assert Job("text", "main", "a", "b", "nara", None, 0, {"rank": 3}).key != job.key
