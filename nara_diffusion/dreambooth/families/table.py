"""The table of families, and the family of a pipeline or a model."""

from __future__ import annotations

from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from nara_diffusion.utils.naming import is_out_of_reach

from .family import Family
from .flows import FLUX, FLUX2, QWEN_IMAGE, SD3, WAN, Z_IMAGE
from .unets import SD, SDXL

FAMILIES = (SD, SDXL, SD3, FLUX, FLUX2, Z_IMAGE, QWEN_IMAGE, WAN)
BY_PIPELINE = {pipeline: family for family in FAMILIES for pipeline in family.pipelines}


def family_of(pipe: Any) -> Family:
    """The family of a pipeline, with its settings. Raises ValueError if none has its class or can train it."""
    family = family_named(type(pipe).__name__)
    return family.fit(pipe, family)


def family_named(pipeline: str) -> Family:
    """The family of a pipeline's class name. Raises ValueError if no family has it."""
    if pipeline not in BY_PIPELINE:
        known = ", ".join(f"{family.title} ({' or '.join(family.pipelines)})" for family in FAMILIES)
        raise ValueError(f"{pipeline} is no class of pipelines that can be trained here: expected {known}.")
    return BY_PIPELINE[pipeline]


def family_of_model(name: str, **hub: Any) -> Family:
    """The family of a folder or repository; raises ValueError as `model_index` and `family_named`."""
    return family_named(str(model_index(name, **hub).get("_class_name")))


def model_index(name: str, **hub: Any) -> dict[str, Any]:
    """The `model_index.json` of a folder, or of a repository on the Hub: classes of the pipeline and its components.

    Args:
        hub: revision, token, ….

    Raises:
        ValueError: there is none, or the Hub can't be reached.
    """
    try:
        return dict(DiffusionPipeline.load_config(name, **hub))  # type: ignore[arg-type]
    except (OSError, ValueError) as error:
        if is_out_of_reach(error):
            raise ValueError(
                f"pretrained_model_name_or_path {name}: there is no such folder, and the Hub, for a repository of that "
                "name, can't be reached: look at the connection, or name a folder."
            ) from error
        raise ValueError(
            f"pretrained_model_name_or_path {name} can't be loaded, since it has no model_index.json, which names the "
            f"family: {str(error).rstrip('.')}. Name a folder that has one, as pipe.save_pretrained(folder) writes it, "
            "or an id on the Hub, which has to be within reach."
        ) from error
