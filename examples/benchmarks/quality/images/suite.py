"""The image benchmark: what is compared, the learning rates that are tried, and the paper's ablations."""

from __future__ import annotations

from typing import Any

from quality.images.cost import image_cost
from quality.images.methods import NAMES
from quality.images.runs import image_records
from quality.images.subjects import BACKBONE, SUBJECTS
from quality.jobs import COST, Job
from quality.suites import MUST, TUNE_DOMAINS, Settings, Suite
from quality.trials import beside, rates, with_core
from quality.variants import resolve

_NARA = with_core((2e-3, 3e-4), (4e-3, 3e-4), (8e-3, 3e-4), (8e-3, 1e-3), (1.6e-2, 3e-4))
_TRIALS: dict[str, tuple[Settings, ...]] = {
    "full": rates(2e-5, 5e-5, 7e-5, 1e-4, 2e-4),
    **dict.fromkeys(("nara", "nara_dora"), _NARA),
    "nara_knots": with_core((2e-3, 1e-3), (4e-3, 1e-3), (8e-3, 1e-3), (8e-3, 3e-3), (1.6e-2, 3e-3)),
    "nara_c": with_core((2e-3, 1e-2), (4e-3, 1e-2), (8e-3, 1e-3), (8e-3, 1e-2), (1.6e-2, 1e-2)),
    "oft": rates(2e-4, 5e-4, 1e-3, 2e-3, 4e-3),
    "vera": rates(2e-3, 5e-3, 1e-2, 2e-2, 4e-2),
}
_DEFAULT_TRIALS = rates(1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)

ABLATIONS = (
    *beside("nara", {"core_scale": 0.01}, {"core_scale": 1.0}),
    *beside("nara", {"rank": 2}, {"rank": 4}, {"rank": 8}),
    *beside("lora", {"rank": 2}, {"rank": 4}, {"rank": 8}),
    *beside("nara", {"noise_embedding": "mlp"}, {"noise_embedding": "raw"}, {"fourier_scale": 1.0}),
    *beside("nara", {"core_sharing": "module_type"}, {"core_sharing": "layer"}),
    *beside("nara", {"core_init": "kaiming"}, {"core_start_step": 100}),
    *beside("nara_knots", {"core_knots": 2}, {"core_knots": 9}),
)


def trials(method: str) -> tuple[Settings, ...]:
    """The settings that tuning tries for `method`; a variant's are those of what it is made of, if it has none."""
    return _TRIALS.get(method) or _TRIALS.get(resolve(method)[0], _DEFAULT_TRIALS)


def run(job: Job, settings: Settings) -> list[dict[str, Any]]:
    """The records of `job`, whose backbone is the only one that there is."""
    if job.stage == COST:
        return [image_cost(job.domain, job.method, settings, job.settings)]
    options = {"stage": job.stage, "control": job.control, "progress": False}
    return image_records(job.domain, job.method, job.seed, **options, **settings)


SUBJECTS_COMPARED = tuple(name for name in SUBJECTS if name not in TUNE_DOMAINS["images"])

SUITE = Suite(
    name="images",
    backbones=(BACKBONE,),
    domains=SUBJECTS_COMPARED,
    tune_domains=TUNE_DOMAINS["images"],
    others=tuple(name for name in NAMES if name not in (*MUST, "base")),
    trials=trials,
    ablations=ABLATIONS,
    ablation_domain=SUBJECTS_COMPARED[0],
    run=run,
)
