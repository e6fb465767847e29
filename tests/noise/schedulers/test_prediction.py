"""What a scheduler takes its denoiser's output for, against its own ᾱ at the last timestep."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
from diffusers import DDIMScheduler

from nara_diffusion.dreambooth.conversion import converted_scheduler
from nara_diffusion.noise.prediction import ZERO_SNR, Prediction, prediction_by

BASE = DDIMScheduler(
    beta_schedule="scaled_linear", prediction_type="v_prediction", rescale_betas_zero_snr=True, clip_sample=False
)
WITH = {"DDIM", "DDPM", "DPMSolverMultistep", "EulerAncestralDiscrete", "EulerDiscrete", "UniPCMultistep"}
WITHOUT = {"DEISMultistep", "DPMSolverSinglestep", "HeunDiscrete", "LMSDiscrete", "PNDM", "SASolver"}


class OwnScheduler(DDIMScheduler):
    """A user's, which passes its options on."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)


@pytest.mark.parametrize("name", sorted(WITH | WITHOUT))
def test_a_solver_that_keeps_anothers_option_without_reading_it_is_taken_for_what_it_does(name: str) -> None:
    kind = getattr(diffusers, f"{name}Scheduler", None) or getattr(diffusers, name)
    solver = kind.from_config(BASE.config)
    assert solver.config.rescale_betas_zero_snr  # kept by all of them
    has_zero_snr = solver.alphas_cumprod[-1].item() < 1e-6
    assert has_zero_snr == (name in WITH)
    expected = Prediction("v_prediction", ZERO_SNR) if has_zero_snr else Prediction("v_prediction")
    assert prediction_by(solver) == expected
    converted = converted_scheduler(solver, None, rescale_betas_zero_snr=True)
    assert converted.alphas_cumprod[-1].item() < 1e-6
    assert (converted is solver) == has_zero_snr


def test_a_users_own_class_that_passes_its_options_on_is_taken_by_them() -> None:
    own = OwnScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert own.alphas_cumprod[-1].item() < 1e-6
    assert prediction_by(own) == Prediction("v_prediction", ZERO_SNR)
