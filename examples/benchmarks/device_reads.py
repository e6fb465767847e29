"""Reads of a device's values by the host: each waits for all kernels that are queued, and breaks a CUDA graph.

A model on the meta device takes the place of one on an accelerator: its tensors have shapes and a device of their own,
and no values. What mixes them with the host's tensors raises, as on an accelerator; and what reads a value raises, but
in a `DeviceReads`, which counts it. So the counts don't depend on the machine, and take no memory at any size.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from kernel_counts import METHODS
from peft import get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from nara_diffusion.dllm import generate, masked_diffusion_loss

DEVICE = torch.device("meta")
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
MASK, LENGTH = 30, 12
TEXT = {"vocab_size": 32, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4}


class DeviceReads(TorchDispatchMode):
    """Count reads of values on `DEVICE` inside the context. The host gets ones; what isn't a mere copy raises."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        source = args[0] if args else None
        if not isinstance(source, Tensor) or source.device != DEVICE:
            return function(*args, **kwargs)
        name = function.name().removeprefix("aten::")
        if name == "_local_scalar_dense":
            self.count += 1
            return torch.ones((), dtype=source.dtype, device="cpu").item()
        if name == "_to_copy" and kwargs.get("device", DEVICE) != DEVICE:
            self.count += 1
            return torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype, device=kwargs["device"])
        return function(*args, **kwargs)


def reads_of_unet(method: str, **changes: Any) -> int:
    """Reads of one forward of SDXL's UNet for two samples, at its true size if there are no `changes`."""
    with DEVICE:
        unet = UNet2DConditionModel(**{**SDXL, **changes})
        inject_adapter_in_model(METHODS[method](r=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), unet)
        width, pooled = unet.config.cross_attention_dim, unet.config.projection_class_embeddings_input_dim
        time_ids = unet.config.addition_time_embed_dim * 6
        conditions = {"text_embeds": torch.empty(2, pooled - time_ids), "time_ids": torch.empty(2, 6)}
        sample = torch.empty(2, 4, unet.config.sample_size, unet.config.sample_size)
        call = {"encoder_hidden_states": torch.empty(2, 77, width), "added_cond_kwargs": conditions}
        with DeviceReads() as reads:
            unet.to(DEVICE)(sample, torch.empty(2), **call)
    return reads.count


def text_model(method: str) -> nn.Module:
    base = LlamaForCausalLM(LlamaConfig(**TEXT, is_causal=False, mask_token_id=MASK, eos_token_id=2))
    return get_peft_model(base, METHODS[method](r=4, target_modules=["q_proj", "up_proj"])).to(DEVICE)


def reads_of_loss(method: str) -> int:
    """Reads of `masked_diffusion_loss` and its backward, for three texts."""
    texts = torch.zeros(3, LENGTH, dtype=torch.long, device=DEVICE)
    with DeviceReads() as reads:
        result = masked_diffusion_loss(text_model(method), texts, [2, 4, 3], sample_indices=[5, 6, 7], seed=0)
        result.loss.backward()
    return reads.count


def reads_of_generation(method: str) -> int:
    """Reads of one step of `generate`, for two prompts: the slope between four steps and eight."""
    model = text_model(method)
    prompts = torch.zeros(2, 3, dtype=torch.long)
    counts = []
    for steps in (4, 8):
        with DeviceReads() as reads:
            generate(model, prompts.to(DEVICE), gen_length=steps, steps=steps, block_length=2, stop_at_eos=False)
        counts.append(reads.count)
    of_step, remainder = divmod(counts[1] - counts[0], 4)
    assert remainder == 0, counts
    return of_step
