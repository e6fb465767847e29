"""The table of families, and the family of a pipeline or a model."""

from __future__ import annotations

from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from .family import Family
from .flow.flux import FLUX
from .flow.flux2 import FLUX2
from .flow.qwen_image import QWEN_IMAGE
from .flow.sd3 import SD3
from .flow.wan import WAN
from .flow.z_image import Z_IMAGE
from .unet.sd import SD
from .unet.sdxl import SDXL

FAMILIES = (SD, SDXL, SD3, FLUX, FLUX2, Z_IMAGE, QWEN_IMAGE, WAN)
BY_PIPELINE = {pipeline: family for family in FAMILIES for pipeline in family.pipelines}
INDEX = "model_index.json"


def known_families() -> str:
    """All families with their pipelines' classes, for messages."""
    return ", ".join(f"{family.title} ({' or '.join(family.pipelines)})" for family in FAMILIES)


def family_of(pipe: Any) -> Family:
    """The family of a pipeline, with its settings. Raises ValueError if none has its class or can train it."""
    family = family_named(type(pipe).__name__)
    return family.fit(pipe, family)


def family_named(pipeline: str) -> Family:
    """The family of a pipeline's class name. Raises ValueError if no family has it."""
    if pipeline not in BY_PIPELINE:
        raise ValueError(f"{pipeline} is no class of pipelines that can be trained here: expected {known_families()}.")
    return BY_PIPELINE[pipeline]


def model_index(name: str, **hub: Any) -> dict[str, Any]:
    """The `model_index.json` of a folder, or of a repository on the Hub: classes of the pipeline and its components.

    Args:
        hub: revision, cache_dir, ….

    Raises:
        ValueError: there is none.
    """
    if name.endswith((".safetensors", ".ckpt")):
        raise ValueError(
            f"pretrained_model_name_or_path {name} is one file of weights: name a folder with a {INDEX}, which "
            "pipe.save_pretrained(folder) writes of a pipeline that was loaded by from_single_file."
        )
    try:
        return dict(DiffusionPipeline.load_config(name, **hub))  # type: ignore[arg-type]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"pretrained_model_name_or_path {name} can't be loaded, since it has no {INDEX}, which names the family: "
            f"{str(error).rstrip('.')}. Name a folder that has one, or an id on the Hub, which has to be within reach."
        ) from error


def family_of_model(name: str, **hub: Any) -> Family:
    """The family of a folder or repository; raises ValueError as `model_index` and `family_named`."""
    try:
        return family_named(model_index(name, **hub)["_class_name"])
    except KeyError as error:
        raise ValueError(f"the {INDEX} of {name} has no _class_name: damaged.") from error
