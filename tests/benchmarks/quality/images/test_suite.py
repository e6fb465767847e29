"""How the benchmark's command asks for image runs."""

from quality.images.subjects import SUBJECTS
from quality.jobs import Job
from quality.suites import load_suite


def test_a_job_becomes_a_run_with_its_settings(monkeypatch):
    asked = {}

    def image_records(subject, method, seed, **options):
        asked.update(options, subject=subject, method=method, seed=seed)
        return [{"method": method}]

    monkeypatch.setattr("quality.images.suite.image_records", image_records)
    suite = load_suite("images")
    job = Job("images", "main", suite.backbones[0], "car", "nara", "shuffled", 3)
    assert suite.run(job, {"rank": 2, "learning_rate": 0.5}) == [{"method": "nara"}]
    assert asked == {
        "subject": "car",
        "method": "nara",
        "seed": 3,
        "control": "shuffled",
        "stage": "main",
        "progress": False,
        "rank": 2,
        "learning_rate": 0.5,
    }


def test_rates_are_tried_on_a_subject_that_is_not_compared():
    suite = load_suite("images")
    assert len(suite.domains) == 3
    assert set(suite.tune_domains) == set(SUBJECTS) - set(suite.domains)
