"""From MODEL and DATA of `nara-check` to a task, with the loss that the train scripts have by default."""

from __future__ import annotations

from typing import Any

import torch

from nara_diffusion.check.images import image_task
from nara_diffusion.check.measurement import CheckTask
from nara_diffusion.check.text import text_task
from nara_diffusion.dllm import AnswerCollator, encode_records, load_backbone, records_from_file
from nara_diffusion.dllm.data import end_token_id
from nara_diffusion.dllm.positions import check_positions
from nara_diffusion.dreambooth.arguments import DreamBoothArguments
from nara_diffusion.dreambooth.denoiser import UNET_TARGETS
from nara_diffusion.dreambooth.latents import LatentCache
from nara_diffusion.dreambooth.objectives import FlowObjective, Objective, build_objective
from nara_diffusion.dreambooth.pipelines import load_pipeline
from nara_diffusion.dreambooth.preparation import load_instances, prompt_cache, training_data
from nara_diffusion.dreambooth.step import TrainingStep
from nara_diffusion.training.adapter_configs import ALL_LINEAR, static_lora
from nara_diffusion.training.arguments import AdapterArguments

_TRAINED_PADDING = 3
_PROMPT = "a photo"


def text_source(args: Any, device: torch.device, dtype: torch.dtype) -> CheckTask:
    """A masked language model on records.

    Args:
        args: a CheckArguments.

    Raises:
        ValueError: see `records_from_file`, `load_backbone`, `encode_records` and `text_task`.
    """
    records = records_from_file(args.data)
    model, tokenizer = load_backbone(args.model, dtype=dtype)
    check_positions(model, args.max_length)
    rows = encode_records(records, tokenizer, max_length=args.max_length, progress=False).rows
    return text_task(
        model,
        static_lora(AdapterArguments(rank=args.rank, target_modules=args.target_modules or [ALL_LINEAR])),
        rows,
        AnswerCollator(end_token_id(tokenizer), _TRAINED_PADDING, args.max_length),
        device=device,
        seed=args.seed,
        batch_size=args.batch_size,
        group_size=args.batch_size,
    )


def image_source(args: Any, device: torch.device, dtype: torch.dtype) -> CheckTask:
    """Stable Diffusion XL on images.

    Args:
        args: a CheckArguments.

    Raises:
        ValueError: see `load_instances`, `load_pipeline`, `training_data` and `image_task`.
    """
    own = DreamBoothArguments(
        pretrained_model_name_or_path=args.model,
        instance_data_dir=args.data,
        instance_prompt=args.prompt or _PROMPT,
        rank=args.rank,
        target_modules=args.target_modules or UNET_TARGETS,
        train_batch_size=args.batch_size,
        seed=args.seed,
    )
    images = load_instances(own, progress=False)
    pipe = load_pipeline(args.model, dtype=dtype).to(device)
    own.resolution = args.resolution or pipe.unet.config.sample_size * pipe.vae_scale_factor
    step = TrainingStep(
        model=pipe.unet,
        objective=objective_of(pipe.scheduler, args.prediction_type),
        latents=LatentCache(pipe.vae),
        prompts=prompt_cache(own, pipe),
        device=device,
        seed=args.seed,
        group_size=args.batch_size,
        stratified=True,
    )
    return image_task(pipe, static_lora(own), step, training_data(own, images, [], pipe), batch_size=args.batch_size)


def objective_of(scheduler: Any, prediction_type: str | None) -> Objective:
    """The objective of a model with this scheduler, or of its conversion to another prediction."""
    if prediction_type == FlowObjective.prediction_type:
        return FlowObjective(levels=scheduler.config.num_train_timesteps)
    if prediction_type is not None:
        scheduler = type(scheduler).from_config(scheduler.config, prediction_type=prediction_type)
    return build_objective(scheduler)
