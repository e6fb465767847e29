"""What a converted model draws, with the scheduler that belongs to what it says, and whether that shows its prompt.

alignment  = mean cosine of a sample and its own prompt
retrieval  = share of samples whose own prompt is the nearest of the ten places'
similarity = mean cosine of a sample and the five pictures of the subject
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from PIL.Image import Image
from torch import Tensor

from nara_diffusion.dreambooth.evaluation.fidelity import Encoder, without_words
from nara_diffusion.dreambooth.evaluation.samples import SampleSettings, sample_images
from quality.assets import ASSETS
from quality.images.drawn import PLACES
from quality.images.measurement import pipeline_of
from quality.images.subjects import IDENTIFIER, SIZE, instance_prompt
from quality.regimes.images.data import subject_data

STEPS, GUIDANCE = 12, 2.5
FIRST_SEED = 1000  # samples of training seed s start from noise 1000 + 100 s
BATCH = 10


class FlowScheduler(FlowMatchEulerDiscreteScheduler):
    """With what SDXL's pipeline asks of a scheduler beside."""

    init_noise_sigma = 1.0

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        return sample


def sampling_scheduler(objective: str, scheduler: Any) -> Any:
    """That of a model with this objective, for a base whose pipeline has `scheduler`."""
    if objective == "eps_to_flow":
        return FlowScheduler(num_train_timesteps=scheduler.config.num_train_timesteps)
    changes: dict[str, dict[str, Any]] = {
        "eps": {},
        "eps_to_v": {"prediction_type": "v_prediction"},
        # the last timestep has to be among those that are sampled (arXiv 2305.08891)
        "zero_snr": {
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        },
    }
    return type(scheduler).from_config(scheduler.config, **changes[objective])


def prompts_of(subject: str) -> list[str]:
    """One for each place."""
    return [f"{instance_prompt(subject)} {place}" for place in PLACES]


def drawn(pipe: Any, unet: Any, objective: str, subject: str, seed: int) -> list[Image]:
    """One sample in each place."""
    call: dict[str, Any] = {"height": SIZE[0], "width": SIZE[1], "guidance_scale": GUIDANCE}
    call["num_inference_steps"] = STEPS
    if objective == "eps_to_flow":
        call["sigmas"] = [1 - step / STEPS for step in range(STEPS)]
    return sample_images(
        pipeline_of(pipe, unet, sampling_scheduler(objective, pipe.scheduler)),
        SampleSettings(prompts_of(subject), 1, FIRST_SEED + 100 * seed, BATCH, call),
    )


def sampled(pipe: Any, unet: Any, objective: str, subject: str, seed: int) -> dict[str, float]:
    """alignment, retrieval and similarity of what is `drawn`."""
    images = _encoder().images(drawn(pipe, unet, objective, subject, seed))  # (n, d)
    texts = _encoder().texts([without_words(prompt, [IDENTIFIER]) for prompt in prompts_of(subject)])
    similarity = (images @ _references(subject).T).mean().item()
    return {**agreement(images @ texts.T), "similarity": similarity}


def agreement(cosines: Tensor) -> dict[str, float]:
    """alignment and retrieval from the cosines (n, n) of samples and prompts, each sample's own on the diagonal."""
    own = torch.arange(len(cosines))
    found = (cosines.argmax(1) == own).float().mean().item()
    return {"alignment": cosines.diagonal().mean().item(), "retrieval": found}


@cache
def _references(subject: str) -> Tensor:
    """Embeddings (5, d) of the subject's pictures."""
    return _encoder().images([record.load() for record in subject_data(subject).instances])


@cache
def _encoder() -> Encoder:
    return Encoder(ASSETS / "clip-tiny", device="cpu")
