"""Families of image models: how each encodes a prompt, calls its denoiser and samples.

    prompts → encode → embeddings, a tuple of (b, …)
    x_λ (b, c, h, w), timestep (b,), embeddings → predict → prediction (b, c, h, w)

x_λ, the timestep and the prediction are defined by the objective. For a rectified flow they are
x_σ = (1 − σ) x + σ ε, N σ and ε − x. A denoiser may take σ or 1 − σ instead of the timestep, take
tokens instead of a grid, or predict x − ε. Only `inputs` and `output` of the family convert them.

The families with a UNet are Stable Diffusion 1, 2 and XL. The six flows have transformers. In their
pipelines, σ is the timestep divided by 1000 for any scheduler configuration. The functions of the
pipelines turn latents into tokens and back, as in Diffusers' training scripts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor, nn

Embeddings = tuple[Tensor, ...]
"""Embeddings of prompts, each (b, …), in floating point; also a mask (b, l), 1 for text."""

Placed = tuple[Tensor | list[int], ...]
"""Embeddings on a device, with the number of tokens of each prompt instead of a mask."""

TRANSFORMER_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class Call:
    """One call of a denoiser, with the quantities that the objective defines."""

    sample: Tensor  # x_λ (b, c, h, w), in the denoiser's dtype
    timestep: Tensor  # (b,)
    # tensors (b, …) in the denoiser's dtype; in place of a mask, the number of tokens of each prompt
    embeddings: tuple[Any, ...]
    time_ids: Tensor  # (b, 6), the (H, W, top, left, h, w) of each `TrainingSample`, in pixels
    family: Family  # with the settings of the run


@dataclass(frozen=True)
class Family:
    """A family of image models. A run changes its settings by `dataclasses.replace`."""

    name: str  # the Hub's tag of its models
    title: str  # for messages
    pipelines: tuple[str, ...]  # names of the pipelines' classes, as in `model_index.json`
    # (pipe, prompts, max_sequence_length) → embeddings, by the pipeline's own `encode_prompt`
    encoder: Callable[[Any, list[str], int | None], Embeddings]
    inputs: Callable[[Call], dict[str, Any]]  # arguments of the denoiser's forward
    # what the denoiser returns → prediction
    output: Callable[[Any, Call], Tensor] = lambda output, call: output
    # the divisor of image sides; the default is for patches of 2 × 2 latents
    divisor: Callable[[Any], int] = lambda pipe: pipe.vae_scale_factor * 2
    denoiser: str = "transformer"  # the name of the component
    text_encoders: tuple[str, ...] = ()  # the components that can be trained too
    cut_short: tuple[str, ...] = ()  # text encoders with an unused last layer
    targets: tuple[str, ...] = TRANSFORMER_TARGETS  # the default of target_modules
    # arguments of a run that differ from the script's defaults
    defaults: Mapping[str, Any] = field(default_factory=dict)
    is_flow: bool = True  # whether model and scheduler are a rectified flow
    # return the family with the settings of a pipeline; raise ValueError if it can't be trained
    fit: Callable[[Any, Family], Family] = lambda pipe, family: family
    # (arguments, number of images) → arguments of the pipeline's call
    sampling: Callable[[dict[str, Any], int], dict[str, Any]] = lambda call, count: call
    # output of the pipeline's call → b PIL images
    images_of: Callable[[Any], Any] = lambda output: output.images
    # code for model cards: takes the first image from that output
    picked: str = ".images[0]"
    # settings:
    max_sequence_length: int | None = None  # tokens of a prompt; None if it has only CLIP's length
    guidance: float | None = None  # that of a denoiser with distilled guidance; None for others
    timestep_of_tokens: bool = False  # whether the denoiser takes one timestep for each token

    @property
    def sample_call(self) -> dict[str, Any]:
        """The arguments that make the pipeline's call encode prompts as the family does."""
        length = self.max_sequence_length
        return {} if length is None else {"max_sequence_length": length}

    def encode(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> Embeddings:
        """Return the embeddings of b prompts, each (b, …).

        They have gradients if the text encoders' weights require them.
        """
        return tuple(self.encoder(pipe, list(prompts), self.max_sequence_length))

    def predict(
        self,
        denoiser: nn.Module,
        sample: Tensor,
        timestep: Tensor,
        time_ids: Tensor,
        embeddings: Placed,
    ) -> Tensor:
        """Return the prediction (b, c, h, w) of the objective's target.

        The shapes are those in `Call`. Pass `placed` embeddings: the host would have to wait for a
        mask on a device.
        """
        dtype = _computing_dtype(denoiser)
        cast = tuple(_cast(each, dtype) for each in embeddings)
        call = Call(sample.to(dtype), timestep, cast, time_ids, self)
        return self.output(denoiser(**self.inputs(call), return_dict=False)[0], call)


def placed(embeddings: Placed, device: torch.device) -> Placed:
    """Return embeddings on `device`. If they come from the CPU, the host doesn't wait."""
    parts: list[Tensor | list[int]] = []
    for part in embeddings:
        if isinstance(part, list):
            parts.append(part)
        elif part.is_floating_point():
            is_here = part.device.type == "cpu"  # copies to the CPU must block
            parts.append(part.to(device, non_blocking=is_here))
        else:
            parts.append(_tokens(part))
    return tuple(parts)


def _cast(part: Tensor | list[int], dtype: torch.dtype) -> Tensor | list[int]:
    if isinstance(part, list):
        return part
    return part.to(dtype) if part.is_floating_point() else _tokens(part)


def _tokens(mask: Tensor) -> list[int]:
    """Return the number of tokens of each prompt, from a mask (b, l) with padding on the right."""
    return mask.sum(1).tolist()


def _computing_dtype(denoiser: nn.Module) -> torch.dtype:
    """Return `denoiser.dtype`, without that property's walk over all modules."""
    kept: Any = getattr(denoiser, "_keep_in_fp32_modules", None) or ()
    for name, parameter in denoiser.named_parameters():
        if not any(part in name for part in kept):
            return parameter.dtype
    return torch.float32


def stack_padded(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors (l_i, …) into (b, l, …), and pad the shorter ones with zeros."""
    return nn.utils.rnn.pad_sequence(list(tensors), batch_first=True)


# ---------------------------------------------------------------- with a UNet


def _unet_divisor(pipe: DiffusionPipeline) -> int:
    """Return the ratio of an image's side to that of the UNet's smallest feature map."""
    return pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)


SD = Family(
    name="stable-diffusion",
    title="Stable Diffusion 1 and 2",
    pipelines=("StableDiffusionPipeline",),
    # states (b, 77, d)
    encoder=lambda pipe, prompts, length: pipe.encode_prompt(
        prompts, pipe.text_encoder.device, 1, False
    )[:1],
    inputs=lambda call: {
        "sample": call.sample,
        "timestep": call.timestep,
        "encoder_hidden_states": call.embeddings[0],
    },
    divisor=_unet_divisor,
    denoiser="unet",
    text_encoders=("text_encoder",),
    defaults={"resolution": 512, "guidance_scale": 7.5},
    is_flow=False,
)


def _sdxl_inputs(call: Call) -> dict[str, Any]:
    states, pooled = call.embeddings
    # bf16 can't represent all integers above 256, such as sizes and crop positions
    conditions = {"text_embeds": pooled, "time_ids": call.time_ids.float()}
    return {**SD.inputs(call), "encoder_hidden_states": states, "added_cond_kwargs": conditions}


def _fit_sdxl(pipe: DiffusionPipeline, family: Family) -> Family:
    kind = pipe.unet.config.addition_embed_type
    if kind != "text_time" or pipe.text_encoder is None or pipe.text_encoder_2 is None:
        raise ValueError(
            f"its UNet has addition_embed_type {kind!r}, expected 'text_time' and two text "
            "encoders: name SDXL's base model, not its refiner."
        )
    return family


SDXL = Family(
    name="stable-diffusion-xl",
    title="Stable Diffusion XL",
    pipelines=("StableDiffusionXLPipeline",),
    # states of two CLIPs (b, 77, d_1 + d_2), and the pooled state of the second (b, p)
    encoder=lambda pipe, prompts, length: pipe.encode_prompt(
        prompts, device=pipe.text_encoder.device, do_classifier_free_guidance=False
    )[::2],
    inputs=_sdxl_inputs,
    divisor=_unet_divisor,
    denoiser="unet",
    text_encoders=("text_encoder", "text_encoder_2"),
    cut_short=("text_encoder",),
    is_flow=False,
    fit=_fit_sdxl,
)


N = 1000


# ---------------------------------------------------------------- rectified flows


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
    """Return the inputs of packed latents: tokens (b, h w / 4, 4 c) and σ."""
    b, c, h, w = call.sample.shape
    return {
        "hidden_states": FluxPipeline._pack_latents(call.sample, b, c, h, w),
        "timestep": call.timestep.float() / N,
        "encoder_hidden_states": call.embeddings[0],
    }


def _unpacked(tokens: Tensor, call: Call) -> Tensor:
    height, width = call.sample.shape[2:]
    return FluxPipeline._unpack_latents(tokens, height, width, 1)


ATTENTION_TARGETS = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
)  # fmt: skip


FEED_FORWARD_TARGETS = (
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
)


SD3 = Family(
    name="stable-diffusion-3",
    title="Stable Diffusion 3 and 3.5",
    pipelines=("StableDiffusion3Pipeline",),
    # states of two CLIPs and T5, which may be missing, and CLIP's pooled states
    encoder=lambda pipe, prompts, length: pipe.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=length
    )[::2],
    inputs=lambda call: {
        "hidden_states": call.sample,
        "timestep": call.timestep,
        "encoder_hidden_states": call.embeddings[0],
        "pooled_projections": call.embeddings[1],
    },
    divisor=lambda pipe: pipe.vae_scale_factor * pipe.transformer.config.patch_size,
    targets=ATTENTION_TARGETS,
    defaults={
        "resolution": 1024,
        "guidance_scale": 7.0,
        "num_inference_steps": 28,
        "weighting_scheme": "logit_normal",
    },
    max_sequence_length=256,
)


def _flux_inputs(call: Call) -> dict[str, Any]:
    (states, pooled), (b, _, h, w) = call.embeddings, call.sample.shape
    like: dict[str, Any] = {"device": call.sample.device, "dtype": call.sample.dtype}
    return _packed(call) | {
        "guidance": _guidance(call),
        "pooled_projections": pooled,
        "txt_ids": torch.zeros(states.shape[1], 3, **like),
        "img_ids": FluxPipeline._prepare_latent_image_ids(b, h // 2, w // 2, **like),
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


def _flux2_inputs(call: Call) -> dict[str, Any]:
    (states,), device = call.embeddings, call.sample.device
    return {
        # (b, h w, c): these latents are patches already
        "hidden_states": Flux2Pipeline._pack_latents(call.sample),
        "timestep": call.timestep.float() / N,
        "guidance": _guidance(call),
        "encoder_hidden_states": states,
        "txt_ids": Flux2Pipeline._prepare_text_ids(states).to(device, non_blocking=True),
        "img_ids": Flux2Pipeline._prepare_latent_ids(call.sample).to(device, non_blocking=True),
    }


FLUX2 = Family(
    name="flux-2",
    title="FLUX.2",
    pipelines=("Flux2Pipeline", "Flux2KleinPipeline"),
    # states of a language model
    encoder=lambda pipe, prompts, length: pipe.encode_prompt(prompts, max_sequence_length=length)[
        :1
    ],
    inputs=_flux2_inputs,
    output=lambda tokens, call: tokens.transpose(1, 2).reshape(call.sample.shape),
    defaults={"resolution": 1024, "guidance_scale": 4.0, "num_inference_steps": 28},
    fit=_fit_guidance,
    max_sequence_length=512,
    guidance=4.0,
)


def _encode_z_image(pipe: DiffusionPipeline, prompts: list[str], length: int | None) -> Embeddings:
    """Return the states of Qwen3 (b, l, d) and their mask (b, l), 1 for text and 0 for padding."""
    states, _ = pipe.encode_prompt(
        prompts, do_classifier_free_guidance=False, max_sequence_length=length
    )
    kept = [torch.ones(len(own), dtype=torch.int64, device=own.device) for own in states]
    return stack_padded(states), stack_padded(kept)


Z_IMAGE = Family(
    name="z-image",
    title="Z-Image",
    pipelines=("ZImagePipeline",),
    encoder=_encode_z_image,
    inputs=lambda call: {
        "x": list(call.sample[:, :, None].unbind(0)),  # b times (c, 1, h, w)
        # rounded as in the pipeline, since the transformer multiplies it by N
        "t": (N - call.timestep.float()) / N,
        "cap_feats": [own[:tokens] for own, tokens in zip(*call.embeddings, strict=True)],
    },
    output=lambda frames, call: -torch.stack(frames)[:, :, 0],
    defaults={"resolution": 1024, "guidance_scale": 5.0, "num_inference_steps": 30},
    max_sequence_length=512,
)


def _encode_qwen_image(
    pipe: DiffusionPipeline, prompts: list[str], length: int | None
) -> Embeddings:
    """Return Qwen2.5-VL's states (b, l, d) and mask (b, l), 1 for text and 0 for padding."""
    states, mask = pipe.encode_prompt(prompts, max_sequence_length=length)
    if mask is None:
        mask = torch.ones(states.shape[:2], dtype=torch.int64, device=states.device)
    return states, mask


def _qwen_image_inputs(call: Call) -> dict[str, Any]:
    (states, tokens), (b, _, h, w) = call.embeddings, call.sample.shape
    mask, length = None, states.shape[1]
    if min(tokens) < length:
        ends = torch.tensor(tokens).to(states.device, non_blocking=True)
        mask = torch.arange(length, device=states.device) < ends[:, None]  # (b, l)
    shapes = [[(1, h // 2, w // 2)]] * b
    return _packed(call) | {"encoder_hidden_states_mask": mask, "img_shapes": shapes}


def _sampling_qwen_image(call: dict[str, Any], count: int) -> dict[str, Any]:
    """Return the arguments of the pipeline's call, with true_cfg_scale for the guidance.

    The pipeline guides only with a negative prompt; its documentation uses " ".
    """
    rest = {name: value for name, value in call.items() if name != "guidance_scale"}
    scale = call.get("guidance_scale", 1.0)
    if scale <= 1:
        return rest
    return {**rest, "true_cfg_scale": scale, "negative_prompt": [" "] * count}


QWEN_IMAGE = Family(
    name="qwen-image",
    title="Qwen-Image",
    pipelines=("QwenImagePipeline",),
    encoder=_encode_qwen_image,
    inputs=_qwen_image_inputs,
    output=_unpacked,
    defaults={"resolution": 1024, "guidance_scale": 4.0, "num_inference_steps": 30},
    sampling=_sampling_qwen_image,
    max_sequence_length=512,
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
    if pipe.transformer is None or pipe.transformer_2 is not None:
        raise ValueError(
            "it has two transformers, one for high and one for low noise, like Wan 2.2's 14B: "
            "expected one, as in Wan 2.1 and Wan 2.2's 5B."
        )
    return replace(family, timestep_of_tokens=bool(pipe.config["expand_timesteps"]))


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


FAMILIES = (SD, SDXL, SD3, FLUX, FLUX2, Z_IMAGE, QWEN_IMAGE, WAN)
BY_PIPELINE = {pipeline: family for family in FAMILIES for pipeline in family.pipelines}
