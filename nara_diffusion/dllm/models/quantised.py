"""Models in 4 or 8 bits, with bitsandbytes."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from peft import prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel


def quantization(
    load_in_4bit: bool, load_in_8bit: bool, dtype: torch.dtype | str | None
) -> BitsAndBytesConfig:
    """Return the configuration for `from_pretrained`: NF4 with double quantisation, or 8 bits.

    Args:
        dtype: that of computations; by default bfloat16.

    Raises:
        ValueError: bitsandbytes isn't installed.
    """
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            "load_in_4bit and load_in_8bit need bitsandbytes, which isn't installed: pip install "
            "'nara-diffusion[optimizers]', or '.[optimizers]' in a clone."
        )
    if dtype in (None, "auto"):  # the file's dtype
        dtype = torch.bfloat16
    elif isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    return BitsAndBytesConfig(
        load_in_4bit=load_in_4bit,
        load_in_8bit=load_in_8bit,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
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
    name = "support_avx512bf16_for_cpu"  # packs weights in evaluation; then they have no gradient
    for module in model.modules():
        if hasattr(module, name):
            setattr(module, name, False)
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
