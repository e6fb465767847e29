"""The trained pipeline, a sampling pipeline with the same frozen weights, and the runs' defaults.

The sampling pipeline has its own modules around the parameters of the trained one, so adapters and
gradient checkpointing affect only one of them. `load_nara_weights` works on it as on a freshly
loaded pipeline, without a second copy of the base model.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors import SafetensorError
from torch import nn

from nara_diffusion.noise.prediction import FLOW, prediction_by
from nara_diffusion.training.arguments import CONFIGS, shipped_settings
from nara_diffusion.training.manifest import local_folder
from nara_diffusion.utils.naming import is_out_of_reach, naming_source, refuse_file

from .families import BY_PIPELINE, FAMILIES
from .family import Family

logger = logging.getLogger(__name__)

STEPS = 500
"""The optimizer steps of a run on a named model. A pass over five images is two steps."""


def family_named(pipeline: str) -> Family:
    """Return the family of a pipeline's class name. Raise ValueError if there is none."""
    if pipeline not in BY_PIPELINE:
        known = ", ".join(
            f"{family.title} ({' or '.join(family.pipelines)})" for family in FAMILIES
        )
        raise ValueError(
            f"{pipeline} is no class of pipelines that can be trained here: expected {known}."
        )
    return BY_PIPELINE[pipeline]


def family_of(pipe: Any) -> Family:
    """Return the family of a pipeline, with its settings.

    Raises:
        ValueError: no family has its class, or the family can't train it.
    """
    family = family_named(type(pipe).__name__)
    return family.fit(pipe, family)


def family_of_model(name: str, **hub: Any) -> Family:
    """Return the family of a folder or repository. Raises as `model_index` and `family_named`."""
    return family_named(str(model_index(name, **hub).get("_class_name")))


def model_index(name: str, **hub: Any) -> dict[str, Any]:
    """Return the `model_index.json` of a folder, or of a repository on the Hub.

    It names the classes of the pipeline and its components. Raises ValueError if there is none, or
    the Hub can't be reached.
    """
    converted = (
        f"StableDiffusionXLPipeline.from_single_file('{name}').save_pretrained('{Path(name).stem}')"
    )
    remedy = f"convert it by {converted}, or its own class, where the Hub can be reached, and name that folder."
    with naming_source(name, "model_index.json", "a model of Diffusers", remedy):
        return dict(diffusers.DiffusionPipeline.load_config(name, **hub))  # type: ignore[arg-type]


def native_resolution(name: str, family: Family, **hub: Any) -> int | None:
    """Return the native side of a model's images, in pixels; None if not in its configuration."""
    read: Any = AutoencoderKL.load_config  # loads any model's configuration
    try:
        side = read(name, subfolder=family.denoiser, **hub).get("sample_size")
        blocks = read(name, subfolder="vae", **hub).get("block_out_channels")
    except OSError:
        return None
    return side * 2 ** (len(blocks) - 1) if isinstance(side, int) and blocks else None


def load_pipeline(
    name: str,
    *,
    dtype: torch.dtype,
    vae_name: str | None = None,
    vae_dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
) -> Any:
    """Load a pipeline of the class that its `model_index.json` names: frozen, on the CPU.

    Args:
        name: folder, or id on the Hub.
        dtype: the dtype of all components except the autoencoder.
        vae_name: folder or id of another autoencoder; None takes the pipeline's own.
        revision, variant: of the pipeline, and of its own autoencoder; a model without files of the
            variant is loaded from the others, with a warning.

    Raises:
        ValueError: there is no such pipeline or autoencoder, or its family can't be trained.
    """
    index = model_index(name, revision=revision)
    if vae_name is not None:
        refuse_file(vae_name, "an autoencoder")
    family = family_named(str(index.get("_class_name")))
    hub = {"revision": revision, "variant": variant}
    vae_source = {"subfolder": "vae", **hub} if vae_name is None else {}
    # Diffusers fails for missing components unless they are passed as None
    absent: dict[str, Any] = {
        part: None for part, classes in index.items() if classes == [None, None]
    }
    if "safety_checker" in index:  # it blackens images that it considers unsafe
        absent |= {"safety_checker": None, "requires_safety_checker": False}
    try:
        vae = getattr(diffusers, index["vae"][1]).from_pretrained(
            vae_name or name, dtype=vae_dtype, **vae_source
        )
        kind = getattr(diffusers, index["_class_name"])
        pipe: Any = kind.from_pretrained(name, vae=vae, dtype=dtype, **hub, **absent)
        _check_scheduler(family.fit(pipe, family), pipe.scheduler)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, SafetensorError) as error:
        unreached = is_out_of_reach(error)
        if (
            variant
            and not unreached
            and any(each in str(error) for each in (f".{variant}.", f"variant={variant}"))
        ):
            logger.warning(
                "%s lacks files of the variant %s: those without one are loaded", name, variant
            )
            sources: dict[str, Any] = {
                "vae_name": vae_name,
                "vae_dtype": vae_dtype,
                "revision": revision,
            }
            return load_pipeline(name, dtype=dtype, **sources)
        what = f"pretrained_model_name_or_path {name}" + (
            f" with the autoencoder {vae_name}" if vae_name else ""
        )
        why = (
            "the Hub can't be reached: look at the connection, or name folders"
            if unreached
            else error
        )
        cure = (
            "; --pretrained_vae_model_name_or_path none takes the model's own autoencoder"
            if vae_name
            else ""
        )
        cure += (
            ", --similarity_model none --alignment_model none do without encoders"
            if vae_name and unreached
            else ""
        )
        raise ValueError(f"{what} can't be loaded as {family.title}: {why}{cure}") from error
    for module in modules_of(pipe).values():
        module.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _check_scheduler(family: Family, scheduler: Any) -> None:
    prediction = prediction_by(scheduler)
    is_flow = prediction is not None and prediction.kind == FLOW
    if not (is_flow if family.is_flow else hasattr(scheduler, "scale_model_input")):
        raise ValueError(
            f"{type(scheduler).__name__} is no scheduler that {family.title} is trained with: put the one that the "
            "model came with into its folder."
        )


def modules_of(pipe: Any) -> dict[str, nn.Module]:
    """Return the models of a pipeline, by name."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def folders_of(args: Any, pipe: Any) -> dict[str, Path]:
    """Return {component: folder} of the models and scheduler that a DreamBoothArguments loads."""
    root = local_folder(args.pretrained_model_name_or_path, revision=args.revision)
    folders = {name: root / name for name in (*modules_of(pipe), "scheduler")}
    if args.pretrained_vae_model_name_or_path is not None:
        folders["vae"] = local_folder(args.pretrained_vae_model_name_or_path)
    return folders


def sharing_pipeline(pipe: Any, dtype: torch.dtype) -> Any:
    """Return a pipeline with new modules around the parameters of `pipe`, which has no adapter yet.

    The autoencoder is in `dtype`. It computes the same bits as a pipeline loaded in `dtype`.
    """
    own = modules_of(pipe)
    memo = {id(t): t for module in own.values() for t in (*module.parameters(), *module.buffers())}
    modules = {name: copy.deepcopy(module, memo) for name, module in own.items()}
    if pipe.vae.dtype != dtype:
        modules["vae"] = copy.deepcopy(pipe.vae).to(dtype)
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    accepted = (
        inspect.signature(type(pipe).__init__).parameters.keys() - pipe.components.keys() - {"self"}
    )
    options = {name: pipe.config[name] for name in accepted if name in pipe.config}
    if "add_watermarker" in accepted:
        options["add_watermarker"] = getattr(pipe, "watermark", None) is not None
    other = type(pipe)(**{**pipe.components, **modules, "scheduler": scheduler}, **options)
    other.set_progress_bar_config(disable=True)
    return other


# ---------------------------------------------------------------------- shipped model, defaults


def shipped_run(
    given: Mapping[str, Any], config: Path = CONFIGS / "sd_tiny_flow.yaml"
) -> dict[str, Any]:
    """Return the shipped run's arguments from `config`, or the `given` model's defaults."""
    if "pretrained_model_name_or_path" in given:
        return family_defaults(given)
    return shipped_settings(
        config,
        given,
        ("instance_data_dir", "instance_prompt", "validation_prompts", "identifier"),
        toy="a toy of 64 pixels",
        shown="max_train_steps learning_rate rank num_inference_steps guidance_scale",
        advice="SDXL at 1024 add --config train_scripts/configs/sdxl_dreambooth.yaml, or with settings of your own "
        "--pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0",
    )


def family_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults for the `given` model and its family, in place of the script's own."""
    name, hub = (
        given["pretrained_model_name_or_path"],
        {"revision": given.get("model_options", {}).get("revision")},
    )
    if not name:
        return {}  # the arguments raise for it
    family = family_of_model(name, **hub)
    defaults = {"target_modules": list(family.targets), **family.defaults, "max_train_steps": STEPS}
    if (resolution := native_resolution(name, family, **hub)) is not None:
        defaults["resolution"] = resolution
        if given.get("resolution", resolution) > 2 * resolution:
            logger.warning(
                "%s was made for %d pixels, and resolution is %d",
                name,
                resolution,
                given["resolution"],
            )
    return defaults
