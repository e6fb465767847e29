"""Frozen weights in 4 or 8 bits, by bitsandbytes and its adapters in Transformers and Diffusers."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from peft import prepare_model_for_kbit_training
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a number in 4 bits: 64 numbers share a constant, in 8 bits with a scale for 256."""
INT8 = 1.0
"""Bytes of a number in 8 bits. The scale of a row isn't counted."""


def quantization(
    load_in_4bit: bool,
    load_in_8bit: bool,
    dtype: torch.dtype | str | None,
    kind: type = BitsAndBytesConfig,
) -> Any:
    """Return the configuration for `from_pretrained`: NF4 with double quantisation, or 8 bits.

    Args:
        dtype: that of computations; by default bfloat16.
        kind: the class of the configuration, that of Transformers or of Diffusers.

    Raises:
        ValueError: bitsandbytes isn't installed.
    """
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            "load_in_4bit and load_in_8bit need bitsandbytes, which isn't installed: pip install "
            "'nara-diffusion[optimizers]', or '.[optimizers]' in a clone."
        )
    return kind(
        load_in_4bit=load_in_4bit,
        load_in_8bit=load_in_8bit,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if dtype in (None, "auto") else dtype,
    )


def check_roundable(config: PreTrainedConfig) -> None:
    """Raise ValueError for a mixture of experts: bitsandbytes rounds the weights of linear layers.

    Experts are stacked, and `prepare_quantised` would cast them to float32.
    """
    experts = getattr(config.get_text_config(), "num_experts", None)
    if experts is not None:
        raise ValueError(
            f"load_in_4bit and load_in_8bit round linear layers only, and this model has {experts} "
            "stacked experts, which would take more memory than in bfloat16: leave them out."
        )


def prepare_quantised(model: PreTrainedModel) -> None:
    """Prepare a model in 4 or 8 bits for an adapter: PEFT casts all other weights to float32."""
    keep_order(model)
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def keep_order(model: nn.Module) -> None:
    """Keep 4-bit weights on a CPU as they are; bitsandbytes packs them in evaluation.

    Packed weights have no gradient.
    """
    name = "support_avx512bf16_for_cpu"
    for module in model.modules():
        if hasattr(module, name):
            setattr(module, name, False)
