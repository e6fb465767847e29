"""llada2-tiny's architecture: LLaDA2's own blocks, 1.0 M parameters, in blocks of 16 positions."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tiny_training import write_json
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from nara_diffusion.dllm.models.pretrained import backbone_on_meta

BLOCK = 16  # positions
# config.json as LLaDA2.0-mini has it, with sizes of its own
FIELDS: dict[str, Any] = {
    "architectures": ["LLaDA2MoeModelLM"],
    "model_type": "llada2_moe",
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
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
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": None,
    "partial_rotary_factor": 0.5,
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "use_bias": False,
    "norm_head": False,
    "tie_word_embeddings": False,
    "dtype": "float32",
    "block_length": BLOCK,
}


def _fields(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return FIELDS | ids | {"vocab_size": len(tokenizer)}


def build_llada2(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """4 layers of width 128: 4 heads, 2 of keys; in the first an MLP of 256, in the others 8 experts of 64, 2 of which
    see a token, and one that all tokens see.

    It is of the class that `load_backbone` makes of this config.json.
    """
    with TemporaryDirectory() as folder:
        write_json(Path(folder, "config.json"), _fields(tokenizer))
        shell = backbone_on_meta(folder, torch.float32)
    model = type(shell)(shell.config)
    model.config.mask_token_id = tokenizer.mask_token_id
    return model


def save_llada2(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write model and tokenizer in the format of LLaDA2's public checkpoints: its tensors' names, its config.json."""
    model.save_pretrained(directory)
    write_json(directory / "config.json", _fields(tokenizer))
    tokenizer.save_pretrained(directory, save_jinja_files=False)
