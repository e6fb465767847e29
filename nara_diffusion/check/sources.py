"""The task of `nara-check` from MODEL and DATA, with the default loss of the train scripts."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, TypeVar

import torch

from nara_diffusion.dllm import AnswerCollator, encode_records, load_backbone, records_from_file
from nara_diffusion.dllm.canvas import check_positions
from nara_diffusion.dllm.data.encoding import end_token_id
from nara_diffusion.dreambooth.conversion import converted_scheduler
from nara_diffusion.dreambooth.families.family import Family
from nara_diffusion.dreambooth.families.pipelines import load_pipeline
from nara_diffusion.dreambooth.families.table import family_of_model
from nara_diffusion.dreambooth.image_arguments import DreamBoothArguments
from nara_diffusion.dreambooth.setup import load_images, run_family, training_data, training_step
from nara_diffusion.training.adapters import ALL_LINEAR
from nara_diffusion.training.arguments import AdapterArguments, OptimizationArguments

from .check_tasks import image_task, text_task
from .trials import CheckTask

T = TypeVar("T")

_PROMPT = "a photo"
_HELD_OUT = 5  # every fifth sample is held out
_FEWEST = 10  # with fewer samples, none is held out


def text_source(args: Any, device: torch.device, dtype: torch.dtype) -> CheckTask:
    """The task of a masked-diffusion language model on records.

    Args:
        args: a CheckArguments.

    Raises:
        ValueError: see `records_from_file`, `load_backbone`, `encode_records` and `text_task`.
    """
    records = records_from_file(args.data)
    model, tokenizer = load_backbone(args.model, dtype=dtype)
    encoded = encode_records(records, tokenizer, max_length=args.max_length, progress=False)
    check_positions(model, encoded.longest)
    rows = encoded.rows
    adapter = AdapterArguments(rank=args.rank, target_modules=args.target_modules or [ALL_LINEAR])
    own = SimpleNamespace(**vars(adapter), **vars(OptimizationArguments(**_rates(args))), seed=args.seed)
    longest = max(len(row["input_ids"]) - row["prompt_length"] for row in rows)  # of an answer and its end
    collator = AnswerCollator(end_token_id(tokenizer), "gen_length", args.max_length, gen_length=longest)
    return text_task(
        model, own, *divide(list(rows)), collator, {"seed": args.seed, "group_size": args.batch_size}, device
    )


def image_source(args: Any, device: torch.device, dtype: torch.dtype) -> CheckTask:
    """The task of an image model on images.

    Args:
        args: a CheckArguments.

    Raises:
        ValueError: see `load_images`, `load_pipeline`, `converted_scheduler`, `training_data` and `image_task`.
    """
    family = family_of_model(args.model)
    own = DreamBoothArguments(
        pretrained_model_name_or_path=args.model,
        instance_data_dir=args.data,
        instance_prompt=args.prompt or _PROMPT,
        rank=args.rank,
        target_modules=args.target_modules or list(family.targets),
        prediction_type=args.prediction_type,
        stratified_timesteps=True,
        seed=args.seed,
        **_rates(args),
    )
    images, _ = load_images(own, progress=False)
    pipe = load_pipeline(args.model, dtype=dtype).to(device)
    denoiser = getattr(pipe, family.denoiser)
    own.resolution = args.resolution or _native_resolution(pipe, denoiser, family)
    scheduler = converted_scheduler(pipe.scheduler, args.prediction_type, False)
    step = training_step(own, pipe, run_family(own, pipe), scheduler, device, args.batch_size)
    return image_task(pipe, own, step, *(training_data(own, part, [], pipe) for part in divide(images)))


def _native_resolution(pipe: Any, denoiser: Any, family: Family) -> int:
    """The side in pixels of the images that the model was made for, by its configuration or its family's default."""
    size = denoiser.config.get("sample_size")
    return size * pipe.vae_scale_factor if isinstance(size, int) else int(family.defaults["resolution"])


def divide(samples: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
    """The training samples and the held-out ones: a fifth; with fewer than ten samples both are all of them."""
    if len(samples) < _FEWEST:
        return samples, samples
    return [sample for i, sample in enumerate(samples) if i % _HELD_OUT], samples[::_HELD_OUT]


def _rates(args: Any) -> dict[str, Any]:
    core = args.learning_rate / 4 if args.core_learning_rate is None else args.core_learning_rate
    return {"train_batch_size": args.batch_size, "learning_rate": args.learning_rate, "core_learning_rate": core}
