"""What an adapted UNet draws of a subject, from noise that depends on the run's seed, and how that is judged."""

from __future__ import annotations

from functools import cache
from statistics import fmean
from typing import Any

from nara_diffusion.dreambooth.encoders import Encoder, text_alignment
from nara_diffusion.dreambooth.samples import SampleSettings, sample_images
from quality.images.held_out import IDENTIFIER, base, instance_prompt, pictures_of, places_of
from quality.running import ASSETS

SAMPLED_PLACES = (
    "on the beach",
    "in the snow",
    "in the city",
    "in the forest",
    "in the desert",
    "at night",
    "on the grass",
)
"""That samples are asked for in."""
FIRST_SAMPLE_SEED = 1000  # samples of training seed s start from noise 1000 + 100 s, …


@cache
def encoder() -> Encoder:
    return Encoder(ASSETS / "clip-tiny", device="cpu")


def judged_samples(subject: str, unet: Any, args: Any) -> dict[str, Any]:
    """Figures of what `unet` draws, with whatever adapter and λ it has now: `n` images; mean cosines, `similarity` to
    the five training pictures, `text_alignment` to the prompts, `place_similarity`, of those in a place, to the subject
    drawn in that place."""
    call = {"height": args.resolution, "width": args.resolution}
    call |= {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
    prompt, seed = instance_prompt(subject), FIRST_SAMPLE_SEED + 100 * args.seed
    sampled_prompts = [prompt, *(f"{prompt} {place}" for place in SAMPLED_PLACES)]
    settings = SampleSettings(sampled_prompts, args.num_validation_images, seed, args.sample_batch_size, call)
    images = sample_images(pipeline_of(unet), settings)
    prompts, in_places = [prompt for prompt, _ in settings.pairs], places_of(subject)
    vectors, drawn = encoder().images(images), list(in_places)
    similarities = vectors @ encoder().images([record.load() for record in pictures_of(subject)]).T  # (n, 5)
    to_places = vectors @ encoder().images(list(in_places.values())).T  # (n, places)
    of_prompts = [to_places[i, drawn.index(prompt)].item() for i, prompt in enumerate(prompts) if prompt in in_places]
    return {
        "similarity": similarities.mean().item(),
        "text_alignment": text_alignment(encoder(), images, prompts, [IDENTIFIER]),
        "place_similarity": fmean(of_prompts),
        "n": len(images),
    }


def pipeline_of(unet: Any) -> Any:
    """The base's pipeline with another UNet; itself unchanged."""
    pipe = base().pipe
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    options = {"force_zeros_for_empty_prompt": pipe.config.force_zeros_for_empty_prompt, "add_watermarker": False}
    other = type(pipe)(**{**pipe.components, "unet": unet, "scheduler": scheduler}, **options)
    other.set_progress_bar_config(disable=True)
    return other
