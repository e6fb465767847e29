"""A family of image models: how it encodes a prompt, calls its denoiser and samples.

The families of Stable Diffusion are here: 1, 2, XL and 3.

    prompts → encode → embeddings, a tuple of (b, …)
    x_λ (b, c, h, w), timestep (b,), embeddings → predict → prediction (b, c, h, w)

x_λ, the timestep and the prediction are defined by the objective. For a rectified flow they are
x_σ = (1 − σ) x + σ ε, N σ and ε − x. A denoiser may take σ or 1 − σ instead of the timestep, take
tokens instead of a grid, or predict x − ε. Only `inputs` and `output` of the family convert them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from PIL.Image import Image
from torch import Tensor, nn

Embeddings = tuple[Tensor, ...]
"""Embeddings of prompts, each (b, …), in floating point; also a mask (b, l), 1 for text."""

Placed = tuple[Tensor | list[int], ...]
"""Embeddings on a device, with the number of tokens of each prompt instead of a mask."""

HIGH, LOW = "transformer", "transformer_2"
"""The denoisers of Wan 2.2 for much and for little noise."""
TRANSFORMER_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
ATTENTION_TARGETS = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
)  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One call of a denoiser, with the quantities that the objective defines."""

    sample: Tensor  # x_λ (b, c, h, w), in the denoiser's dtype
    timestep: Tensor  # (b,)
    # tensors (b, …) in the denoiser's dtype; in place of a mask, the number of tokens of each prompt
    embeddings: tuple[Any, ...]
    time_ids: Tensor  # (b, 6), the (H, W, top, left, h, w) of each `TrainingSample`, in pixels
    family: Family  # with the settings of the run
    # latents of the images to edit, each (b, c, h_i, w_i), whose tokens follow those of the sample
    sources: tuple[Tensor, ...] = ()


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
    targets: tuple[str, ...] = TRANSFORMER_TARGETS  # the default of target_modules
    # arguments of a run that differ from the script's defaults
    defaults: Mapping[str, Any] = field(default_factory=dict)
    can_be_distilled: bool = False  # whether it has plain guidance at the sampler's own timesteps
    is_flow: bool = True  # whether model and scheduler are a rectified flow
    # return the family with the settings of a pipeline
    fit: Callable[[Any, Family], Family] = lambda pipe, family: family
    # (arguments, number of images) → arguments of the pipeline's call
    sampling: Callable[[dict[str, Any], int], dict[str, Any]] = lambda call, count: call
    # output of the pipeline's call → b PIL images
    images_of: Callable[[Any], Any] = lambda output: output.images
    # code for model cards: takes the first image from that output
    picked: str = ".images[0]"
    most_sources: int = 0  # images that an edit model takes
    needs_source: bool = False  # whether it takes at least one
    # (pipe, image to edit) → pixels (1, 3, h, w) in [−1, 1], resized as the pipeline resizes it
    source_pixels: Callable[[Any, Image], Tensor] | None = None
    # (pipe, prompt, images to edit) → embeddings, if the text encoder reads these images
    source_encoder: Callable[[Any, str, list[Image]], Embeddings] | None = None
    # settings:
    max_sequence_length: int | None = None  # tokens of a prompt; None if it has only CLIP's length
    guidance: float | None = None  # that of a denoiser with distilled guidance; None for others
    timestep_of_tokens: bool = False  # whether the denoiser takes one timestep for each token
    boundary: float | None = None  # of two denoisers: timesteps from here on are those of `HIGH`
    expert: str | None = None  # of two denoisers: the one that is trained; None means both

    @property
    def denoisers(self) -> tuple[str, ...]:
        """The names of the pipeline's denoisers."""
        return (self.denoiser,) if self.boundary is None else (HIGH, LOW)

    @property
    def trained(self) -> tuple[str, ...]:
        """The names of the denoisers that are trained."""
        return self.denoisers if self.expert is None else (self.expert,)

    def denoiser_at(self, timestep: Tensor) -> str:
        """Return the name of the denoiser that the pipeline calls at a timestep, ()."""
        if self.boundary is None:
            return self.denoiser
        return HIGH if timestep >= self.boundary else LOW

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
        sources: Sequence[Tensor] = (),
    ) -> Tensor:
        """Return the prediction (b, c, h, w) of the objective's target.

        The shapes are those in `Call`. Pass `placed` embeddings: the host would have to wait for a
        mask on a device.
        """
        dtype = _computing_dtype(denoiser)
        cast = tuple(part.to(dtype) if isinstance(part, Tensor) else part for part in embeddings)
        beside = tuple(source.to(dtype) for source in sources)
        call = Call(sample.to(dtype), timestep, cast, time_ids, self, beside)
        return self.output(denoiser(**self.inputs(call), return_dict=False)[0], call)


def placed(embeddings: Placed, device: torch.device) -> Placed:
    """Return embeddings on `device`. If they come from the CPU, the host doesn't wait."""
    parts: list[Tensor | list[int]] = []
    for part in embeddings:
        if isinstance(part, list):
            parts.append(part)
        elif part.is_floating_point():
            # copies to the CPU must block
            parts.append(part.to(device, non_blocking=part.device.type == "cpu"))
        else:
            parts.append(part.sum(1).tolist())  # the padding is on the right
    return tuple(parts)


def _computing_dtype(denoiser: nn.Module) -> torch.dtype:
    """Return the dtype that `denoiser` computes in, without a walk over all modules."""
    quantizer = getattr(denoiser, "hf_quantizer", None)
    if quantizer is not None:
        return quantizer.quantization_config.bnb_4bit_compute_dtype
    in_float32: Any = getattr(denoiser, "_keep_in_fp32_modules", None) or ()
    for name, parameter in denoiser.named_parameters():
        if not any(part in name for part in in_float32):
            return parameter.dtype
    return torch.float32


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
    can_be_distilled=True,
    is_flow=False,
)


def _sdxl_inputs(call: Call) -> dict[str, Any]:
    states, pooled = call.embeddings
    # bf16 can't represent all integers above 256, such as sizes and crop positions
    conditions = {"text_embeds": pooled, "time_ids": call.time_ids.float()}
    return {**SD.inputs(call), "encoder_hidden_states": states, "added_cond_kwargs": conditions}


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
    can_be_distilled=True,
    is_flow=False,
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
    can_be_distilled=True,
    max_sequence_length=256,
)
