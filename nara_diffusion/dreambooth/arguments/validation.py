"""The arguments of samples and of what is measured on them."""

# ruff: noqa: RUF009 (option() is dataclasses.field() with metadata, not a shared default)
from __future__ import annotations

from dataclasses import dataclass

from nara_diffusion.training.arguments.cli import option


@dataclass
class ValidationArguments:
    """Samples and measurement"""

    validation_prompts: list[str] | None = option(
        None,
        "Quoted prompts to sample before, after, and every --validation_steps; none takes the instance prompt, or "
        "without one the first four captions.",
        sentences=True,
        aliases=("validation_prompt",),
    )
    validation_epochs: int | None = option(
        None, "Sample and measure every so often, in place of --validation_steps.", unit="epochs", resumable=True
    )
    num_validation_images: int = option(
        4, "Images for each of them, with the seeds --seed, --seed + 1, ….", unit="images"
    )
    num_inference_steps: int = option(30, "Denoising steps of a sample.", unit="steps")
    guidance_scale: float = option(5.0, "Classifier-free guidance of samples; 1 disables it.")
    sample_batch_size: int = option(4, "Images that are sampled at once.", unit="images")
    validation_data_dir: str | None = option(
        None,
        "Further images of the subject for the validation loss; none takes the training images, on other noise.",
        content="validation data",
    )
    similarity_model: str | None = option(
        None,
        "DINO, DINOv2 or CLIP that compares samples with the subject: folder or Hub id; none doesn't.",
        resumable=True,
    )
    alignment_model: str | None = option(
        None, "CLIP that compares samples with their prompts: folder or Hub id; none doesn't.", resumable=True
    )
    identifier: list[str] | None = option(None, "Words that it is not to read, such as sks, which it doesn't know.")
    curve_points: int = option(10, "Noise levels at which the validation loss is measured.", unit="points")
