"""The text benchmark: what is compared, and the learning rates that are tried."""

from __future__ import annotations

from typing import Any

from quality.jobs import Job, Settings, Suite, rates, with_core
from quality.text.domains import DOMAINS
from quality.text.runs import text_records

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
}
"""Seven for each method."""


def run(job: Job, settings: Settings) -> list[dict[str, Any]]:
    """The records of `job`."""
    return text_records(
        job.backbone, job.domain, job.method, job.seed, stage=job.stage, control=job.control, **settings
    )


SUITE = Suite("text", ("llada-tiny", "dream-tiny"), tuple(DOMAINS), _TRIALS.__getitem__, run)
