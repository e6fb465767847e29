"""From the script's arguments to what measures samples, and to the samples themselves: encoders, prompts, seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nara_diffusion.dreambooth.arguments import DreamBoothArguments
from nara_diffusion.dreambooth.data.records import ImageRecord
from nara_diffusion.dreambooth.families.family import Family

from .before_after import Evaluator
from .encoders import Encoder
from .sampling import SampleSettings

_SAMPLED_CAPTIONS = 4


def make_evaluator(args: DreamBoothArguments, instances: Sequence[ImageRecord], device: torch.device) -> Evaluator:
    """The encoders that measure samples; one that both arguments name is loaded once.

    Raises:
        ValueError: an encoder that can't be loaded, or one without a text tower for prompts.
    """
    options: dict[str, Any] = {"device": device, "progress": False}
    named = {name for name in (args.similarity_model, args.alignment_model) if name is not None}
    encoders: dict[str | None, Encoder] = {name: Encoder(name, **options) for name in sorted(named)}
    texts = encoders.get(args.alignment_model)
    if texts is not None:
        texts.check_text()
    references = [record.source.load() for record in instances]
    return Evaluator(references, encoders.get(args.similarity_model), texts, args.identifier or ())


def sample_settings(args: DreamBoothArguments, instances: Sequence[ImageRecord], family: Family) -> SampleSettings:
    """Samples of what `args` name, or of the first captions of `instances`, at the training resolution."""
    captions = list(dict.fromkeys(record.prompt for record in instances))[:_SAMPLED_CAPTIONS]
    call = sample_call(args, family)
    return SampleSettings(args.prompts or captions, args.num_validation_images, args.seed, args.sample_batch_size, call)


def sample_call(args: DreamBoothArguments, family: Family) -> dict[str, Any]:
    """Arguments of a pipeline's call as `args` have them, under the names of `SampleSettings.call`."""
    return {
        "height": args.resolution,
        "width": args.resolution,
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        **family.sample_call,
    }
