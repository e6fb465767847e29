"""The families that edit images: FLUX.1 Kontext and Qwen-Image-Edit.

    tokens (b, l + l_1 + …) = those of x_λ, then those of each source,    loss on the first l

The sample's λ holds for all tokens, as in the pipelines, which pass one timestep per sample. FLUX.2
takes sources too, and is in `flow_families`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from diffusers.pipelines.flux import pipeline_flux_kontext as kontext
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit_plus
from PIL.Image import Image
from torch import Tensor

from .families import Embeddings
from .flow_families import FLUX, QWEN_IMAGE, masked_states

AREA = 1024**2
"""The area in pixels that the models were trained at."""
SMALL = 700**2
"""The area below which a run doesn't enlarge sources to a size that FLUX.1 Kontext prefers."""


def kontext_source(pipe: DiffusionPipeline, image: Image) -> Tensor:
    """Return the pixels of an image to edit, at the size that the model prefers for its proportions."""
    processor, multiple = pipe.image_processor, pipe.vae_scale_factor * 2
    height, width = processor.get_default_height_width(image)
    if image.width * image.height >= SMALL:
        proportion = width / height
        width, height = min(
            kontext.PREFERRED_KONTEXT_RESOLUTIONS,
            key=lambda size: (abs(proportion - size[0] / size[1]), size),
        )
    height, width = height // multiple * multiple, width // multiple * multiple
    return processor.preprocess(processor.resize(image, height, width), height, width)


def sampling_kontext(call: dict[str, Any], count: int) -> dict[str, Any]:
    """Return the arguments of the pipeline's call, which otherwise resizes images to `AREA`."""
    area = call["height"] * call["width"]
    options: dict[str, Any] = {} if area == AREA else {"max_area": area}
    return call | options | ({"_auto_resize": False} if area < SMALL else {})


FLUX_KONTEXT = replace(
    FLUX,
    title="FLUX.1 Kontext",
    pipelines=("FluxKontextPipeline",),
    sampling=sampling_kontext,
    most_sources=1,
    needs_source=True,
    source_pixels=kontext_source,
)


def qwen_source(pipe: DiffusionPipeline, image: Image) -> Tensor:
    """Return the pixels of an image to edit, of the area `AREA`."""
    width, height = edit_plus.calculate_dimensions(AREA, image.width / image.height)
    return pipe.image_processor.preprocess(image, height, width)


def encode_qwen_edit(
    pipe: DiffusionPipeline, prompt: str, images: list[Image], *, area: int
) -> Embeddings:
    """Return the states and mask of a prompt and its images, which the encoder sees at an area."""
    resized = []
    for image in images:
        width, height = edit_plus.calculate_dimensions(area, image.width / image.height)
        resized.append(pipe.image_processor.resize(image, height, width))
    return masked_states(*pipe.encode_prompt([prompt], image=resized))


QWEN_IMAGE_EDIT = replace(
    QWEN_IMAGE,
    title="Qwen-Image-Edit",
    pipelines=("QwenImageEditPipeline",),
    most_sources=1,
    needs_source=True,
    source_pixels=qwen_source,
    source_encoder=partial(encode_qwen_edit, area=AREA),
    max_sequence_length=None,
)
QWEN_IMAGE_EDIT_PLUS = replace(
    QWEN_IMAGE_EDIT,
    title="Qwen-Image-Edit with several images",
    pipelines=("QwenImageEditPlusPipeline",),
    most_sources=3,
    source_encoder=partial(encode_qwen_edit, area=edit_plus.CONDITION_IMAGE_SIZE),
)
