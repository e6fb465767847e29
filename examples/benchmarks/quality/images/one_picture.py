"""T-LoRA in its own regime: one picture of a subject, batches of one, as in results/one_picture_plan.md.

    python examples/benchmarks/benchmark_quality.py --modality one_picture --domains rank_16 --seeds 100 \\
        --set learning_rate=0.001
    python examples/benchmarks/benchmark_quality.py --modality one_picture --seeds 400 401 402

tlora            r_min 1, orthonormal A and B = 0
tlora_residual   r_min 1, the published start: --adapter_options lora_a_init=residual
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from quality.images.held_out import BACKBONE, bin_centres, held_out_losses, pictures_of
from quality.images.runs import held_out, loss_of
from quality.images.samples import judged_samples
from quality.images.training import ControlledDenoiser, adapted, arguments
from quality.running import Job, Settings, Suite, optimize, records_of

SUBJECT = "toy"
RANKS = {"rank_16": 16, "rank_64": 64}
METHODS = ("lora", "dora", "nara", "tlora", "tlora_residual")
OPTIONS = {"train_batch_size": 1, "max_train_steps": 300}
HALF = slice(None, None, 2)
"""Every second held-out picture."""
RATES: Mapping[str, float] = dict.fromkeys(METHODS, 0.001)
"""{method: its rate}, chosen as the plan says."""


def run(job: Job, settings: Settings) -> list[dict[str, Any]]:
    """The record of `job`, whose domain names the rank."""
    adapter, _, start = job.method.partition("_")
    options: dict[str, Any] = {**OPTIONS, "rank": RANKS[job.domain]}
    if adapter == "tlora":
        options["lora_a_init"] = start or "orthogonal"
    if "learning_rate" not in settings:
        options["learning_rate"] = RATES[job.method]
    args = arguments(SUBJECT, adapter, job.seed, {**options, **settings})
    started = time.perf_counter()
    torch.manual_seed(job.seed)
    unet = adapted(adapter, args)
    denoiser = ControlledDenoiser(unet, None)
    optimize(denoiser, loss_of(SUBJECT, denoiser, args, pictures_of(SUBJECT)[:1]), args)

    def measure() -> dict[str, Any]:
        losses = [held_out_losses(unet, noisy.rows(HALF)).mean().item() for noisy in held_out(SUBJECT)]
        figures = {"noise_levels": bin_centres(), "losses": losses, "validation_loss": sum(losses) / len(losses)}
        return figures | judged_samples(SUBJECT, unet, args)

    return records_of(job, args, {**options, **settings}, unet, measure, started, evaluated=())


class OnePicture(Suite):
    """The suite, whose rates are `RATES`."""

    def rates(self, backbone: str, method: str) -> Settings:
        return {}


SUITE = OnePicture("one_picture", (BACKBONE,), tuple(RANKS), run, METHODS, has_controls=False)
