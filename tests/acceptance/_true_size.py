"""Models of their true size without weights, on meta, and the inputs of a training and a sampling step of each."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import DynamicCache

from nara_diffusion import noise_level
from nara_diffusion.dllm import masked_diffusion_loss
from nara_diffusion.dllm.canvas_loss import CanvasBatch, canvas_loss, corrupt_canvases
from nara_diffusion.dllm.decoding import Sampling
from nara_diffusion.dllm.masked_sampler import State, WholeText
from nara_diffusion.dllm.models.backbone import Backbone
from nara_diffusion.dllm.models.pretrained import backbone_on_meta
from tests.acceptance._rehearsed import (
    Denoiser,
    Rehearsed,
    flux_inputs,
    qwen_inputs,
    sd3_inputs,
    sdxl_inputs,
    wan_inputs,
)
from tests.acceptance._runs import ASSETS

LENGTH, PROMPT, CANVAS = 1024, 512, 256
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
JOINT = [*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TWINS = r".*(encoder\.language_model|decoder)\.layers\..*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


# ---------------------------------------------------------------------- text


@dataclass
class Text(Rehearsed):
    """A masked-diffusion language model, from its shipped config.json."""

    name: str
    billions: float
    targets: list[str] | str

    def build(self) -> Any:
        return backbone_on_meta(str(TRUE_SIZE / self.name), torch.bfloat16)

    def loss(self, model: Any, device: str) -> Tensor:
        ids = torch.zeros(2, LENGTH, dtype=torch.long, device=device).add(1)
        with gradient_at_embeddings(model):
            return masked_diffusion_loss(model, ids, [PROMPT, 9], seed=0, sample_indices=[0, 1]).loss

    def sample(self, model: Any, device: str) -> Tensor:
        """Two prompts, guided; the host's read of the rows with a mask left is none of this step."""
        backbone, sampling = Backbone(model), Sampling(gen_length=128, block_length=32, cfg_scale=1.5)
        prompts = torch.ones(2, PROMPT, dtype=torch.long)
        with unset_fake_temporarily():  # prompts are read on the host, before they are moved
            state = State(backbone, sampling, prompts, mask_token_id=0, eos_token_id=0)
        for name, value in vars(state).items():
            setattr(state, name, value.to(device) if isinstance(value, Tensor) else value)
        reader, places = WholeText(), state.positions[:, :32]
        state.step(reader, [0, 1], places, reader.level(state, places), 4)
        return state.sequences


@dataclass
class Canvas(Rehearsed):
    """DiffusionGemma, whose encoder and decoder share their weights."""

    billions: float
    targets: list[str] | str
    passes = 2  # without gradient for self-conditioning, and with
    saving = 0.0  # the encoder isn't checkpointed, and on meta its attention keeps all probabilities

    def build(self) -> Any:
        return backbone_on_meta(str(TRUE_SIZE / "diffusiongemma-26b"), torch.bfloat16)

    def alone(self) -> Any:
        model = self.frozen()
        for name, parameter in model.named_parameters():
            if name.endswith("input_layernorm.weight") and "vision" not in name:
                parameter.requires_grad_()  # an encoder that doesn't learn runs once for both passes
        return model

    def loss(self, model: Any, device: str) -> Tensor:
        with unset_fake_temporarily():  # canvases are drawn by NumPy
            ids, key = torch.full((2, LENGTH), 3), {"seed": 0, "sample_indices": [0, 1]}
            batch = corrupt_canvases(ids, [PROMPT, 9], canvas_length=CANVAS, vocab_size=1000, **key)
        moved = CanvasBatch(**{name: value.to(device) for name, value in vars(batch).items()})
        with gradient_at_embeddings(model):
            return canvas_loss(model, moved).loss

    def sample(self, model: Any, device: str) -> Tensor:
        ids = torch.zeros(2, PROMPT, dtype=torch.long, device=device)
        canvas = torch.zeros(2, CANVAS, dtype=torch.long, device=device)
        with noise_level(model, torch.tensor([0.2, 0.9], device=device)):
            return model(input_ids=ids, decoder_input_ids=canvas, cache=DynamicCache()).logits


class gradient_at_embeddings:
    """Inside the context, embedded tokens need a gradient, as they do where an adapter comes before a layer."""

    def __init__(self, model: nn.Module) -> None:
        embeddings = [embedding for embedding in model.modules() if isinstance(embedding, nn.Embedding)]
        self.handles = [
            embedding.register_forward_hook(lambda *given: given[-1].requires_grad_()) for embedding in embeddings
        ]

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


# ---------------------------------------------------------------------- the models

TRUE_SIZE = ASSETS / "true_size"


def _shipped(name: str) -> dict[str, Any]:
    return json.loads((TRUE_SIZE / name / "config.json").read_text())


MODELS: dict[str, Rehearsed] = {
    "sdxl": Denoiser(
        diffusers.StableDiffusionXLPipeline,
        diffusers.UNet2DConditionModel,
        _shipped("sdxl/unet"),
        2.57,
        sdxl_inputs,
        latents="sample",
        targets=ATTENTION,
    ),
    "sd3-medium": Denoiser(
        diffusers.StableDiffusion3Pipeline,
        diffusers.SD3Transformer2DModel,
        {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
        2.03,
        sd3_inputs,
        targets=JOINT,
    ),
    "flux.1": Denoiser(
        diffusers.FluxPipeline,
        diffusers.FluxTransformer2DModel,
        _shipped("flux.1-dev/transformer"),
        11.9,
        flux_inputs,
        targets=JOINT,
    ),
    "qwen-image": Denoiser(
        diffusers.QwenImagePipeline,
        diffusers.QwenImageTransformer2DModel,
        {},
        20.4,
        qwen_inputs,
        targets=JOINT,
        unused="transformer_blocks.59.attn.to_add_out",  # the text after the last block
    ),
    "wan-14b": Denoiser(
        diffusers.WanPipeline, diffusers.WanTransformer3DModel, {}, 14.3, wan_inputs, targets=ATTENTION
    ),
    "llada-8b": Text("llada-8b", 8.02, LINEAR),
    "dream-7b": Text("dream-7b", 7.62, LINEAR),
    "diffusiongemma-26b": Canvas(25.4, TWINS),
}
"""The models' own defaults are Qwen-Image's and Wan 2.1's of 14 B."""
