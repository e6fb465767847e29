"""The families that are rectified flows with a transformer, also those that edit images.

In their pipelines, σ is the timestep divided by 1000 for any scheduler configuration. The functions
of the pipelines turn latents into tokens and back, as in Diffusers' training scripts. Images to
edit (sources) are further tokens; the sample's λ holds for all tokens, as in the pipelines:

    tokens (b, l + l_1 + …) = those of x_λ, then those of each source,    loss on the first l
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers.pipelines.flux import pipeline_flux_kontext as kontext
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit_plus
from PIL.Image import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .families import ATTENTION_TARGETS, TRANSFORMER_TARGETS, Call, Embeddings, Family

N = 1000
AREA = 1024**2
"""The area in pixels that the models were trained at."""
SMALL = 700**2
"""The area below which a run doesn't enlarge sources to a size that FLUX.1 Kontext prefers."""


def _guidance(call: Call) -> Tensor | None:
    """Return the guidance scale (b,) float32 if the denoiser has distilled guidance; else None."""
    if call.family.guidance is None:
        return None
    return torch.full((len(call.sample),), call.family.guidance, device=call.sample.device)


def _fit_guidance(pipe: DiffusionPipeline, family: Family) -> Family:
    if pipe.transformer.config.guidance_embeds:
        return family
    return replace(family, guidance=None)


def _packed(call: Call) -> dict[str, Any]:
    """Return the inputs of packed latents: tokens (b, h w / 4, 4 c), then the sources', and σ."""
    grids = (call.sample, *call.sources)
    tokens = [FluxPipeline._pack_latents(grid, *grid.shape) for grid in grids]
    return {
        "hidden_states": torch.cat(tokens, dim=1),
        "timestep": call.timestep.float() / N,
        "encoder_hidden_states": call.embeddings[0],
    }


def _unpacked(tokens: Tensor, call: Call) -> Tensor:
    height, width = call.sample.shape[2:]
    tokens = tokens[:, : height * width // 4]  # without those of sources
    return FluxPipeline._unpack_latents(tokens, height, width, 1)


FEED_FORWARD_TARGETS = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")


def _flux_inputs(call: Call) -> dict[str, Any]:
    states, pooled = call.embeddings
    like: dict[str, Any] = {"device": call.sample.device, "dtype": call.sample.dtype}
    ids = []
    for grid in (call.sample, *call.sources):
        b, _, h, w = grid.shape
        ids.append(FluxPipeline._prepare_latent_image_ids(b, h // 2, w // 2, **like))
        if grid is not call.sample:  # as in the pipeline
            ids[-1][:, 0] = 1
    return _packed(call) | {
        "guidance": _guidance(call),
        "pooled_projections": pooled,
        "txt_ids": torch.zeros(states.shape[1], 3, **like),
        "img_ids": torch.cat(ids),
    }


FLUX = Family(
    name="flux",
    title="FLUX.1",
    pipelines=("FluxPipeline",),
    # states of T5, and the pooled state of CLIP
    encoder=lambda pipe, prompts, length: pipe.encode_prompt(
        prompts, None, max_sequence_length=length
    )[:2],
    inputs=_flux_inputs,
    output=_unpacked,
    targets=(*ATTENTION_TARGETS, *FEED_FORWARD_TARGETS),
    defaults={"resolution": 1024, "guidance_scale": 3.5, "num_inference_steps": 28},
    fit=_fit_guidance,
    max_sequence_length=512,
    guidance=3.5,
)


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


def _flux2_inputs(call: Call) -> dict[str, Any]:
    (states,), device = call.embeddings, call.sample.device
    # (b, h w, c): these latents are patches already
    tokens = [Flux2Pipeline._pack_latents(grid) for grid in (call.sample, *call.sources)]
    ids = [Flux2Pipeline._prepare_latent_ids(call.sample)]
    if call.sources:
        of_sources = Flux2Pipeline._prepare_image_ids([source[:1] for source in call.sources])
        ids.append(of_sources.expand(len(call.sample), -1, -1))
    return {
        "hidden_states": torch.cat(tokens, dim=1),
        "timestep": call.timestep.float() / N,
        "guidance": _guidance(call),
        "encoder_hidden_states": states,
        "txt_ids": Flux2Pipeline._prepare_text_ids(states).to(device, non_blocking=True),
        "img_ids": torch.cat(ids, dim=1).to(device, non_blocking=True),
    }


def unpacked_flux2(tokens: Tensor, call: Call) -> Tensor:
    """Return the prediction (b, c, h, w) from the first tokens, those of the sample."""
    height, width = call.sample.shape[2:]
    return tokens[:, : height * width].transpose(1, 2).reshape(call.sample.shape)


def flux2_source(pipe: DiffusionPipeline, image: Image) -> Tensor:
    """Return the pixels of an image to edit, of at most 1024²."""
    processor, multiple = pipe.image_processor, pipe.vae_scale_factor * 2
    processor.check_image_input(image)
    image = processor._resize_if_exceeds_area(image)
    height, width = (side // multiple * multiple for side in (image.height, image.width))
    return processor.preprocess(image, height=height, width=width, resize_mode="crop")


FLUX2 = Family(
    name="flux-2",
    title="FLUX.2",
    pipelines=("Flux2Pipeline", "Flux2KleinPipeline"),
    # states of a language model
    encoder=lambda pipe, prompts, length: pipe.encode_prompt(prompts, max_sequence_length=length)[
        :1
    ],
    inputs=_flux2_inputs,
    output=unpacked_flux2,
    # most blocks have queries, keys, values and feed-forward in one; their `to_out` is left out,
    # because in the other blocks a module of this name is a list
    targets=(*TRANSFORMER_TARGETS, "to_qkv_mlp_proj"),
    defaults={"resolution": 1024, "guidance_scale": 4.0, "num_inference_steps": 28},
    fit=_fit_guidance,
    most_sources=10,
    source_pixels=flux2_source,
    max_sequence_length=512,
    guidance=4.0,
)


def _encode_z_image(pipe: DiffusionPipeline, prompts: list[str], length: int | None) -> Embeddings:
    """Return the states of Qwen3 (b, l, d) and their mask (b, l), 1 for text and 0 for padding."""
    states, _ = pipe.encode_prompt(
        prompts, do_classifier_free_guidance=False, max_sequence_length=length
    )
    masks = [torch.ones(len(state), dtype=torch.int64, device=state.device) for state in states]
    return pad_sequence(states, batch_first=True), pad_sequence(masks, batch_first=True)


Z_IMAGE = Family(
    name="z-image",
    title="Z-Image",
    pipelines=("ZImagePipeline",),
    encoder=_encode_z_image,
    inputs=lambda call: {
        "x": list(call.sample[:, :, None].unbind(0)),  # b times (c, 1, h, w)
        # rounded as in the pipeline, since the transformer multiplies it by N
        "t": (N - call.timestep.float()) / N,
        "cap_feats": [state[:tokens] for state, tokens in zip(*call.embeddings, strict=True)],
    },
    output=lambda frames, call: -torch.stack(frames)[:, :, 0],
    defaults={"resolution": 1024, "guidance_scale": 5.0, "num_inference_steps": 30},
    max_sequence_length=512,
)


def masked_states(states: Tensor, mask: Tensor | None) -> Embeddings:
    """Return Qwen2.5-VL's states (b, l, d) and mask (b, l), 1 for text and 0 for padding."""
    if mask is None:
        mask = torch.ones(states.shape[:2], dtype=torch.int64, device=states.device)
    return states, mask


def _qwen_image_inputs(call: Call) -> dict[str, Any]:
    states, tokens = call.embeddings
    mask, length = None, states.shape[1]
    if min(tokens) < length:
        ends = torch.tensor(tokens).to(states.device, non_blocking=True)
        mask = torch.arange(length, device=states.device) < ends[:, None]  # (b, l)
    grids = (call.sample, *call.sources)
    shapes = [(1, grid.shape[2] // 2, grid.shape[3] // 2) for grid in grids]
    arguments = {"encoder_hidden_states_mask": mask, "img_shapes": [shapes] * len(states)}
    return _packed(call) | arguments


def _sampling_qwen_image(call: dict[str, Any], count: int) -> dict[str, Any]:
    """Return the arguments of the pipeline's call, with true_cfg_scale for the guidance.

    The pipeline guides only with a negative prompt; its documentation uses " ".
    """
    renamed = dict(call)
    scale = renamed.pop("guidance_scale", 1.0)
    if scale > 1:
        renamed |= {"true_cfg_scale": scale, "negative_prompt": [" "] * count}
    return renamed


QWEN_IMAGE = Family(
    name="qwen-image",
    title="Qwen-Image",
    pipelines=("QwenImagePipeline",),
    encoder=lambda pipe, prompts, length: masked_states(
        *pipe.encode_prompt(prompts, max_sequence_length=length)
    ),
    inputs=_qwen_image_inputs,
    output=_unpacked,
    defaults={"resolution": 1024, "guidance_scale": 4.0, "num_inference_steps": 30},
    sampling=_sampling_qwen_image,
    max_sequence_length=512,
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


def _wan_inputs(call: Call) -> dict[str, Any]:
    """Return the inputs of a one-frame video; Wan 2.2's 5B takes one timestep per token."""
    timestep, (height, width) = call.timestep, call.sample.shape[2:]
    if call.family.timestep_of_tokens:
        timestep = timestep[:, None].expand(-1, (height // 2) * (width // 2))
    frames = call.sample[:, :, None]  # (b, c, 1, h, w)
    return {
        "hidden_states": frames,
        "timestep": timestep,
        "encoder_hidden_states": call.embeddings[0],
    }


def _fit_wan(pipe: DiffusionPipeline, family: Family) -> Family:
    ratio, boundary = pipe.config["boundary_ratio"], None
    if ratio is not None and pipe.transformer_2 is not None:
        boundary = ratio * pipe.scheduler.config.num_train_timesteps
    timestep_of_tokens = bool(pipe.config["expand_timesteps"])
    return replace(family, boundary=boundary, timestep_of_tokens=timestep_of_tokens)


WAN = Family(
    name="wan",
    title="Wan (one frame)",
    pipelines=("WanPipeline",),
    # states of UMT5
    encoder=lambda pipe, prompts, length: pipe.encode_prompt(
        prompts, do_classifier_free_guidance=False, max_sequence_length=length
    )[:1],
    inputs=_wan_inputs,
    output=lambda frames, call: frames[:, :, 0],
    divisor=lambda pipe: pipe.vae_scale_factor_spatial * pipe.transformer.config.patch_size[1],
    defaults={"resolution": 512, "guidance_scale": 5.0, "num_inference_steps": 30},
    fit=_fit_wan,
    sampling=lambda call, count: call | {"num_frames": 1, "output_type": "pil"},
    images_of=lambda output: [frames[0] for frames in output.frames],
    picked=".frames[0][0]",
    max_sequence_length=512,
)
