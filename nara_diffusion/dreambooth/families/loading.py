"""The pipeline that is trained, and the pipeline that samples, with one set of frozen weights.

The sampling pipeline has its own modules around the parameters of the trained one, so adapters and gradient
checkpointing affect only one of them. `load_nara_weights` on it does what it does on a freshly loaded pipeline, without
a second copy of the base model.
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
from safetensors import SafetensorError
from torch import nn

from nara_diffusion.noise.schedulers.prediction import FLOW, prediction_by
from nara_diffusion.training.adapters.pissa import takes_start_from_base
from nara_diffusion.training.checkpoints.digests import local_folder

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
    """Load a pipeline of the class that its `model_index.json` names: frozen, on the CPU.

    Args:
        name: folder, or id on the Hub.
        dtype: of all components but the autoencoder.
        vae_name: folder or id of another autoencoder; None takes the pipeline's own.
        vae_dtype: of the autoencoder.
        revision, variant: of the pipeline, and of its own autoencoder; variant is for example "fp16".
        cache_dir: where downloads are kept.

    Raises:
        ValueError: there is no such pipeline or autoencoder, or its family can't be trained.
    """
    index = model_index(name, revision=revision, cache_dir=cache_dir)
    kind = index["_class_name"]
    family = family_named(kind)
    hub = {"revision": revision, "variant": variant, "cache_dir": cache_dir}
    vae_source = {"subfolder": "vae", **hub} if vae_name is None else {"cache_dir": cache_dir}
    # Diffusers fails for missing components unless they are passed as None
    absent = {part: None for part, classes in index.items() if classes == [None, None]}
    try:
        vae = getattr(diffusers, index["vae"][1]).from_pretrained(vae_name or name, dtype=vae_dtype, **vae_source)
        # without a dtype Diffusers loads float32, whatever the file holds
        options = {**hub, **absent, **family.loading}
        pipe: Any = getattr(diffusers, kind).from_pretrained(name, vae=vae, dtype=dtype, **options)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, SafetensorError) as error:
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
    """`load_pipeline` with the arguments of a DreamBoothArguments, all but the dtypes."""
    return partial(
        load_pipeline,
        args.pretrained_model_name_or_path,
        vae_name=args.pretrained_vae_model_name_or_path,
        revision=args.revision,
        variant=args.variant,
        cache_dir=args.cache_dir,
    )


def check_trainable(pipe: Any, family: Family, name: str) -> None:
    """Raises ValueError, with the model's name, if its family can't train the pipeline."""
    try:
        family.fit(pipe, family)
        _check_scheduler(pipe.scheduler, family)
    except ValueError as error:
        raise ValueError(f"{name} can't be trained as {family.title}: {error}") from error


def _check_scheduler(scheduler: Any, family: Family) -> None:
    prediction = prediction_by(scheduler)
    if family.is_flow and (prediction is None or prediction.kind != FLOW):
        raise ValueError(
            f"{type(scheduler).__name__} is no scheduler of a rectified flow: put the scheduler that the model came "
            "with into its folder, such as FlowMatchEulerDiscreteScheduler."
        )
    if not family.is_flow and not hasattr(scheduler, "scale_model_input"):
        raise ValueError(
            f"{type(scheduler).__name__} has no noise schedule that {family.title} is trained with: expected one with "
            "betas, or an EDM one."
        )


def modules_of(pipe: Any) -> dict[str, nn.Module]:
    """The models of a pipeline, by name."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def folders_of(args: Any, pipe: Any) -> dict[str, Path]:
    """{component: folder} of what was loaded with the arguments of a DreamBoothArguments: the models, the scheduler."""
    hub = {"revision": args.revision, "cache_dir": args.cache_dir}
    root = local_folder(args.pretrained_model_name_or_path, **hub)
    folders = {name: root / name for name in (*modules_of(pipe), "scheduler")}
    if args.pretrained_vae_model_name_or_path is not None:
        folders["vae"] = local_folder(args.pretrained_vae_model_name_or_path, cache_dir=args.cache_dir)
    return folders


def absent_components(pipe: Any) -> list[str]:
    """The components that are None and have to be passed as None: `from_pretrained(…, text_encoder_3=None)`."""
    return sorted(
        name for name, part in pipe.components.items() if part is None and name not in pipe._optional_components
    )


def sharing_pipeline(pipe: Any, dtype: torch.dtype) -> Any:
    """A pipeline with its own modules around the parameters of `pipe`, and the autoencoder in `dtype`.

    Call it before an adapter is added to `pipe`. It computes the same bits as a pipeline that is loaded in `dtype`.
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
    """The arguments of the constructor beside components."""
    accepted = inspect.signature(type(pipe).__init__).parameters.keys() - pipe.components.keys() - {"self"}
    options = {name: pipe.config[name] for name in accepted if name in pipe.config}
    if "add_watermarker" in accepted:
        options["add_watermarker"] = getattr(pipe, "watermark", None) is not None
    return options


def sampling_pipeline(pipe: Any, config: PeftConfig | None, dtype: torch.dtype, load: Callable[..., Any]) -> Any:
    """The pipeline that samples while `pipe` is trained with an adapter of `config`, or, if that is None, in full.

    Call it before the adapter is added. It shares the parameters of `pipe`, unless training changes these; then `load`
    loads another pipeline.
    """
    if config is None or takes_start_from_base(config):
        return load(dtype=dtype, vae_dtype=dtype).to(pipe.device)
    return sharing_pipeline(pipe, dtype)


def model_name(name: str) -> str:
    """The last part of a model's path or id."""
    return Path(name).name


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]
