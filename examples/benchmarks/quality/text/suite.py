"""The text benchmark: what is compared, the learning rates that are tried, and the paper's ablations."""

from __future__ import annotations

from typing import Any

from quality.jobs import COST, Job
from quality.suites import TUNE_DOMAINS, Settings, Suite
from quality.text.cost import text_cost
from quality.text.domains import DOMAINS
from quality.text.runs import text_records
from quality.trials import beside, rates, with_core
from quality.variants import resolve

_LORA = rates(5e-3, 7.5e-3, 1e-2, 1.5e-2, 2e-2, 3e-2, 4e-2)
_NARA = with_core((1e-2, 3e-4), (1.5e-2, 3e-4), (1.5e-2, 1e-3), (2e-2, 1e-4), (2e-2, 3e-4), (2e-2, 1e-3), (3e-2, 3e-4))
_KNOTS = with_core((1e-2, 1e-3), (1e-2, 3e-3), (1.5e-2, 3e-3), (2e-2, 1e-3), (2e-2, 3e-3), (2e-2, 1e-2), (3e-2, 3e-3))
_STATIC = with_core((1e-2, 1e-3), (1e-2, 1e-2), (1.5e-2, 3e-3), (2e-2, 1e-3), (2e-2, 3e-3), (2e-2, 1e-2), (3e-2, 3e-3))

_TRIALS: dict[str, tuple[Settings, ...]] = {
    "full": rates(5e-4, 1e-3, 1.5e-3, 2e-3, 2.5e-3, 3e-3, 4e-3),
    **dict.fromkeys(("lora", "dora", "multi_lora", "tlora"), _LORA),
    **dict.fromkeys(("nara", "nara_dora"), _NARA),
    "nara_knots": _KNOTS,
    "nara_c": _STATIC,
    "oft": rates(1e-3, 3e-3, 6e-3, 1e-2, 2e-2),
    "vera": rates(1e-2, 3e-2, 6e-2, 1e-1, 2e-1),
    "prompt_tuning": rates(3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "p_tuning": rates(3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
}
"""Seven for each method of the main runs, five for one that runs on one seed."""
_DEFAULT_TRIALS = rates(5e-3, 1e-2, 1.5e-2, 2e-2, 3e-2)

LATE = tuple({"learning_rate": 2e-2, "core_learning_rate": r, "core_start_step": 250} for r in (3e-3, 1e-2))
"""A and B alone for the first half, then the core at a rate that the schedule has halved by then."""

ABLATIONS = (
    *beside("nara", {"core_scale": 0.01}, {"core_scale": 1.0}),
    *beside("nara", {"rank": 2}, {"rank": 4}, {"rank": 8}),
    *beside("lora", {"rank": 2}, {"rank": 4}, {"rank": 8}),
    *beside("nara", {"noise_embedding": "mlp"}, {"noise_embedding": "raw"}),
    *beside("nara", {"fourier_scale": 1.0}, {"fourier_scale": 4.0}),
    *beside("nara", {"core_sharing": "module_type"}, {"core_sharing": "layer"}),
    *beside("nara", {"core_init": "zero_all"}, {"core_init": "kaiming"}),
    *beside("nara", {"core_input": "mask_density"}, {"core_input": "both"}),
    *beside("nara", {"core_start_step": 250}, {"told": "masked_share"}),
    *beside("nara_knots", {"core_knots": 2}, {"core_knots": 9}, *LATE),
)
"""The paper's, and the options that were tried for a better one."""


def trials(method: str) -> tuple[Settings, ...]:
    """The settings that tuning tries for `method`; a variant's are those of what it is made of, if it has none."""
    return _TRIALS.get(method) or _TRIALS.get(resolve(method)[0], _DEFAULT_TRIALS)


def run(job: Job, settings: Settings) -> list[dict[str, Any]]:
    """The records of `job`."""
    if job.stage == COST:
        return [text_cost(job.backbone, job.domain, job.method, settings, job.settings)]
    return text_records(
        job.backbone, job.domain, job.method, job.seed, stage=job.stage, control=job.control, **settings
    )


SUITE = Suite(
    name="text",
    backbones=("llada-tiny", "dream-tiny"),
    domains=tuple(DOMAINS),
    tune_domains=TUNE_DOMAINS["text"],
    others=("rslora", "pissa", "hira", "vera", "adalora", "oft", "prompt_tuning", "p_tuning"),
    trials=trials,
    ablations=ABLATIONS,
    ablation_domain="commonsense",
    run=run,
)
