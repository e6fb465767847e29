"""Models of their true size without weights, on meta, and the inputs of a training and a sampling step of each."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import DynamicCache

from nara_diffusion import NaraConfig, noise_level
from nara_diffusion.dllm import masked_diffusion_loss
from nara_diffusion.dllm.block_loss import canvas_loss
from nara_diffusion.dllm.decoding import Sampling, State
from nara_diffusion.dllm.models.backbone import Backbone
from nara_diffusion.dllm.models.pretrained import backbone_on_meta
from nara_diffusion.dllm.sampler import place_prompts
from nara_diffusion.dllm.uniform import CanvasBatch, corrupt_canvases
from nara_diffusion.training.engines import recompute_activations
from tests.acceptance._runs import ASSETS

RANK, LENGTH, PROMPT, CANVAS = 16, 1024, 512, 256
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
JOINT = [*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TWINS = r".*(encoder\.language_model|decoder)\.layers\..*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


class Rehearsed:
    """A model in bfloat16 on meta, with an adapter or without: the base of `Denoiser`, `Text` and `Canvas`.

    Attributes:
        targets: the modules to adapt.
        billions: parameters of the model.
        passes: forwards of each adapted layer in a training step, checkpointing aside.
        saving: how many times less checkpointing keeps, at least.
        unused: a part of the names of layers that nothing reads, and that get no gradient.
    """

    targets: list[str] | str
    billions: float
    passes = 1
    saving = 3.0
    unused = "none"

    def build(self) -> Any:
        """Return the model, where meta is the default device."""
        raise NotImplementedError

    def frozen(self) -> Any:
        with torch.device("meta"):
            model = self.build()
        return model.to(torch.bfloat16).requires_grad_(False).eval()

    def alone(self) -> Any:
        """Return the model without an adapter, to count its own kernels."""
        return self.frozen()

    def adapted(self, **options: Any) -> Any:
        """Return the model with a NaRA of rank 16 in float32."""
        config = NaraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=self.targets, **options)
        model = self.frozen()
        with torch.device("meta"):
            return self.insert(model, config)

    def insert(self, model: Any, config: NaraConfig) -> Any:
        return get_peft_model(model, config)

    def save(self, model: Any, folder: Path) -> Path:
        """Return the file with the adapter's weights."""
        model.save_pretrained(folder)
        return folder / "adapter_model.safetensors"

    def load(self, folder: Path) -> Any:
        """Return a new model with the adapter in `folder`."""
        return PeftModel.from_pretrained(self.frozen(), folder)

    def checkpoint(self, model: Any, is_on: bool) -> None:
        """Turn gradient checkpointing on or off."""
        if is_on:
            recompute_activations(model.get_base_model())
        else:
            model.get_base_model().activation_checkpointing_disable()

    def loss(self, model: Any, device: str) -> Tensor:
        """Return the scalar loss of two samples with a λ each. The inputs of the first layer get a gradient too."""
        raise NotImplementedError

    def sample(self, model: Any, device: str) -> Tensor:
        """Return what the model predicts in a step of sampling with guidance."""
        raise NotImplementedError


# ---------------------------------------------------------------------- images


@dataclass
class Denoiser(Rehearsed):
    """A denoiser of a Diffusers pipeline.

    Attributes:
        inputs: (draw, number of samples) → the arguments of a forward; `draw(*shape)` returns a tensor.
        latents: the name of the argument that has the noisy latents.
    """

    pipeline: Any
    kind: Any
    fields: dict[str, Any]
    billions: float
    inputs: Callable[[Callable[..., Tensor], int], dict[str, Any]]
    latents: str = "hidden_states"
    targets: list[str] | str = "all"
    unused: str = "none"

    @property
    def component(self) -> str:
        return "unet" if "unet" in inspect.signature(self.pipeline).parameters else "transformer"

    def build(self) -> Any:
        return self.kind.from_config(self.fields)

    def insert(self, model: Any, config: NaraConfig) -> Any:
        model.add_adapter(config)
        return model

    def around(self, denoiser: nn.Module) -> Any:
        """Return the pipeline of `denoiser`, without its other models."""
        names = dict(inspect.signature(self.pipeline).parameters)
        required = [name for name, parameter in names.items() if parameter.default is inspect.Parameter.empty]
        is_flow = self.component == "transformer"
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler() if is_flow else diffusers.DDPMScheduler()
        return self.pipeline(**{**dict.fromkeys(required), self.component: denoiser, "scheduler": scheduler})

    def save(self, model: Any, folder: Path) -> Path:
        self.around(model).save_nara_weights(folder)
        (file,) = folder.glob("*.safetensors")
        return file

    def load(self, folder: Path) -> Any:
        model = self.frozen()
        self.around(model).load_nara_weights(folder)
        return model.to("meta")  # where all layers are on meta, their core is loaded to the CPU

    def checkpoint(self, model: Any, is_on: bool) -> None:
        (model.enable_gradient_checkpointing if is_on else model.disable_gradient_checkpointing)()

    def loss(self, model: Any, device: str) -> Tensor:
        given = self.inputs(partial(torch.randn, dtype=torch.bfloat16, device=device), 2)
        for name in (self.latents, "encoder_hidden_states"):
            given[name].requires_grad_()
        output = model(**given, return_dict=False)[0]
        return (output.float() - torch.randn_like(output)).square().mean()

    def sample(self, model: Any, device: str) -> Tensor:
        given = self.inputs(partial(torch.randn, dtype=torch.bfloat16, device=device), 4)
        given["timestep"] = given["timestep"][0].expand(4)
        return model(**given, return_dict=False)[0]


def _sdxl(draw: Callable[..., Tensor], n: int) -> dict[str, Any]:
    return {
        "sample": draw(n, 4, 128, 128),
        "timestep": draw(n, dtype=torch.float32),
        "encoder_hidden_states": draw(n, 77, 2048),
        "added_cond_kwargs": {"text_embeds": draw(n, 1280), "time_ids": draw(n, 6)},
    }


def _sd3(draw: Callable[..., Tensor], n: int) -> dict[str, Any]:
    return {
        "hidden_states": draw(n, 16, 128, 128),
        "timestep": draw(n, dtype=torch.float32),
        "encoder_hidden_states": draw(n, 333, 4096),
        "pooled_projections": draw(n, 2048),
    }


def _flux(draw: Callable[..., Tensor], n: int) -> dict[str, Any]:
    return {
        "hidden_states": draw(n, 4096, 64),
        "timestep": draw(n),
        "encoder_hidden_states": draw(n, 512, 4096),
        "pooled_projections": draw(n, 768),
        "guidance": draw(n),
        "img_ids": draw(4096, 3),
        "txt_ids": draw(512, 3),
    }


def _qwen(draw: Callable[..., Tensor], n: int) -> dict[str, Any]:
    return {
        "hidden_states": draw(n, 4096, 64),
        "timestep": draw(n),
        "encoder_hidden_states": draw(n, 512, 3584),
        "img_shapes": [[(1, 64, 64)]] * n,
    }


def _wan(draw: Callable[..., Tensor], n: int) -> dict[str, Any]:
    """Of 81 frames of 480 × 832 pixels."""
    return {
        "hidden_states": draw(n, 16, 21, 60, 104),
        "timestep": draw(n, dtype=torch.float32),
        "encoder_hidden_states": draw(n, 512, 4096),
    }


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
        with unset_fake_temporarily():  # prompts are read on the host, before they are moved
            placed = place_prompts(backbone, torch.ones(2, PROMPT, dtype=torch.long), 128, 0, 0)
        moved = [None if each is None else each.to(device) for each in placed]
        tokens = torch.zeros(1, dtype=torch.long, device=device)
        state = State(backbone, sampling, 0, tokens, tokens[:0], tokens, *moved, None)
        state._step([0, 1], slice(0, 32), 4)
        state.finish_rows()
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
        embeddings = [each for each in model.modules() if isinstance(each, nn.Embedding)]
        self.handles = [each.register_forward_hook(lambda *given: given[-1].requires_grad_()) for each in embeddings]

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
        _sdxl,
        latents="sample",
        targets=ATTENTION,
    ),
    "sd3-medium": Denoiser(
        diffusers.StableDiffusion3Pipeline,
        diffusers.SD3Transformer2DModel,
        {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
        2.03,
        _sd3,
        targets=JOINT,
    ),
    "flux.1": Denoiser(
        diffusers.FluxPipeline,
        diffusers.FluxTransformer2DModel,
        _shipped("flux.1-dev/transformer"),
        11.9,
        _flux,
        targets=JOINT,
    ),
    "qwen-image": Denoiser(
        diffusers.QwenImagePipeline,
        diffusers.QwenImageTransformer2DModel,
        {},
        20.4,
        _qwen,
        targets=JOINT,
        unused="transformer_blocks.59.attn.to_add_out",  # the text after the last block
    ),
    "wan-14b": Denoiser(diffusers.WanPipeline, diffusers.WanTransformer3DModel, {}, 14.3, _wan, targets=ATTENTION),
    "llada-8b": Text("llada-8b", 8.02, LINEAR),
    "dream-7b": Text("dream-7b", 7.62, LINEAR),
    "diffusiongemma-26b": Canvas(25.4, TWINS),
}
"""The models' own defaults are Qwen-Image's and Wan 2.1's of 14 B."""
