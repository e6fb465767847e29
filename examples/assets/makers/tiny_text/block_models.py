"""The two families of small models with attention by blocks, as their public checkpoints are written.

llada2-tiny has LLaDA2's layers with experts, and blocks of 16 positions; sdar-tiny SDAR's dense layers and blocks of 4.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tiny_training import write_json
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from nara_diffusion.dllm.models.pretrained import backbone_on_meta

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
# config.json as LLaDA2.0-mini has it, with sizes of its own
LLADA2: dict[str, Any] = SIZES | {
    "architectures": ["LLaDA2MoeModelLM"],
    "model_type": "llada2_moe",
    "moe_intermediate_size": 64,
    "num_experts": 8,
    "num_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
    "partial_rotary_factor": 0.5,
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "use_bias": False,
    "norm_head": False,
    "block_length": 16,
}
# as SDAR-4B-Chat has it
SDAR: dict[str, Any] = SIZES | {
    "architectures": ["SDARForCausalLM"],
    "model_type": "sdar",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "block_size": 4,
    "use_sliding_window": False,
}
FIELDS = {"llada2": LLADA2, "sdar": SDAR}


def config_fields(family: str, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The fields of config.json for a tokenizer."""
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return FIELDS[family] | ids | {"vocab_size": len(tokenizer)}


def build_block_model(fields: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """4 layers of width 128: 4 heads, 2 of keys, an MLP of 256.

    LLaDA2 has that MLP in the first layer only; the others have 8 experts of 64, 2 of which see a token, and one that
    all tokens see. The model is of the class that `load_backbone` makes of this config.json.
    """
    with TemporaryDirectory() as folder:
        write_json(Path(folder, "config.json"), fields)
        shell = backbone_on_meta(folder, torch.float32)
    model = type(shell)(shell.config)
    model.config.mask_token_id = tokenizer.mask_token_id
    return model


def save_block_model(
    model: PreTrainedModel, fields: dict[str, Any], tokenizer: PreTrainedTokenizerFast, directory: Path
) -> None:
    """Write model and tokenizer in the family's public format: its tensors' names, its config.json."""
    model.save_pretrained(directory)
    write_json(directory / "config.json", fields)
    tokenizer.save_pretrained(directory, save_jinja_files=False)
