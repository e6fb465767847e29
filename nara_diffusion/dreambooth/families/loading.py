"""The pipeline that is trained, and the pipeline that samples: two pipelines, one set of frozen weights.

The sampling pipeline has modules of its own around the parameters of the trained one, so that adapters and gradient
checkpointing reach only one of them. `load_nara_weights` on it gives what a user gets from a freshly loaded pipeline,
without a second copy of the base model.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from peft import PeftConfig
from torch import nn

from nara_diffusion.noise.schedulers.prediction import FLOW, prediction_by
from nara_diffusion.training.adapters.pissa import takes_start_from_base

from .family import Family
from .table import family_named, model_index


def load_pipeline(
    name: str,
    *,
    dtype: torch.dtype,
    vae_name: str | None = None,
    vae_dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
) -> Any:
    """A frozen pipeline on the CPU, of the class that its `model_index.json` names.

    Args:
        name: folder, or id on the Hub.
        dtype: of all but the autoencoder.
        vae_name: another autoencoder's folder or id; None takes the pipeline's own.
        vae_dtype: of the autoencoder.
        revision, variant: of the pipeline, and of its own autoencoder; variant is for example "fp16".

    Raises:
        ValueError: there is no such pipeline or autoencoder, or it is of no family that can be trained.
    """
    index = model_index(name, revision=revision, cache_dir=cache_dir)
    kind = index["_class_name"]
    family = family_named(kind)
    hub = {"revision": revision, "variant": variant, "cache_dir": cache_dir}
    vae_source = {"subfolder": "vae", **hub} if vae_name is None else {"cache_dir": cache_dir}
    # which Diffusers would miss, were they not said to be left out
    absent = {part: None for part, classes in index.items() if classes == [None, None]}
    try:
        vae = getattr(diffusers, index["vae"][1]).from_pretrained(vae_name or name, dtype=vae_dtype, **vae_source)
        # without a dtype Diffusers loads float32, whatever the file holds
        options = {**hub, **absent, **family.loading}
        pipe: Any = getattr(diffusers, kind).from_pretrained(name, vae=vae, dtype=dtype, **options)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        what = f"pretrained_model_name_or_path {name}" + (f" with the autoencoder {vae_name}" if vae_name else "")
        raise ValueError(
            f"{what} can't be loaded as {family.title}: {str(error).rstrip('.')}. Name a folder with a "
            "model_index.json, or an id on the Hub."
        ) from error
    check_trainable(pipe, family, name)
    for module in modules_of(pipe).values():
        module.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def loader_of(args: Any) -> Callable[..., Any]:
    """`load_pipeline` with all but its dtypes as a DreamBoothArguments has them."""
    return partial(
        load_pipeline,
        args.pretrained_model_name_or_path,
        vae_name=args.pretrained_vae_model_name_or_path,
        revision=args.revision,
        variant=args.variant,
        cache_dir=args.cache_dir,
    )


def check_trainable(pipe: Any, family: Family, name: str) -> None:
    """Raises ValueError, with the model's name, for one that its family can't train."""
    try:
        family.fit(pipe, family)
        _check_scheduler(pipe.scheduler, family)
    except ValueError as error:
        raise ValueError(f"{name} can't be trained as {family.title}: {error}") from error


def _check_scheduler(scheduler: Any, family: Family) -> None:
    prediction = prediction_by(scheduler)
    if family.is_flow and (prediction is None or prediction.kind != FLOW):
        raise ValueError(
            f"{type(scheduler).__name__} is no scheduler of a rectified flow: give the model's folder the scheduler "
            "that it came with, such as FlowMatchEulerDiscreteScheduler."
        )
    if not family.is_flow and not hasattr(scheduler, "scale_model_input"):
        raise ValueError(
            f"{type(scheduler).__name__} has no noise schedule that {family.title} is trained with: expected one with "
            "betas, or an EDM one."
        )


def modules_of(pipe: Any) -> dict[str, nn.Module]:
    """The models of a pipeline, by name."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def absent_components(pipe: Any) -> list[str]:
    """List the components that are None and have to be passed so: `from_pretrained(…, text_encoder_3=None)`."""
    return sorted(
        name for name, part in pipe.components.items() if part is None and name not in pipe._optional_components
    )


def sharing_pipeline(pipe: Any, dtype: torch.dtype) -> Any:
    """A pipeline with modules of its own around the parameters of `pipe`, its autoencoder in `dtype`.

    Make it before anything is added to `pipe`. A user's pipeline loaded in `dtype` computes the same bits.
    """
    own = modules_of(pipe)
    memo = {id(t): t for module in own.values() for t in _tensors(module)}
    modules = {name: copy.deepcopy(module, memo) for name, module in own.items()}
    if pipe.vae.dtype != dtype:
        modules["vae"] = copy.deepcopy(pipe.vae).to(dtype)
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    other = type(pipe)(**{**pipe.components, **modules, "scheduler": scheduler}, **_options_of(pipe))
    other.set_progress_bar_config(disable=True)
    return other


def _options_of(pipe: Any) -> dict[str, Any]:
    """Return what the constructor took beside components."""
    accepted = inspect.signature(type(pipe).__init__).parameters.keys() - pipe.components.keys() - {"self"}
    options = {name: pipe.config[name] for name in accepted if name in pipe.config}
    if "add_watermarker" in accepted:
        options["add_watermarker"] = getattr(pipe, "watermark", None) is not None
    return options


def sampling_pipeline(pipe: Any, config: PeftConfig | None, dtype: torch.dtype, load: Callable[..., Any]) -> Any:
    """The pipeline that samples while `pipe` is trained with an adapter of `config`.

    Make it before the adapter is added. It shares the parameters of `pipe`, unless training changes those: then `load`
    makes another pipeline.
    """
    if config is None or takes_start_from_base(config):
        return load(dtype=dtype, vae_dtype=dtype).to(pipe.device)
    return sharing_pipeline(pipe, dtype)


def model_name(name: str) -> str:
    """Return the name that people call a model: the end of a path or id."""
    return Path(name).name


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]
