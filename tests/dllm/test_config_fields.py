"""Which published configurations load, and that fields which aren't known are refused.

The fields are those of the files or configuration classes named beside them; sizes are tiny.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nara_diffusion.dllm.models.pretrained import backbone_on_meta
from tests.helpers.mixtures import LLADA2, LLADA_MOE

LLADA: dict[str, Any] = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig"},
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 24,
    "embedding_dropout": 0.0,
    "embedding_size": 40,
    "eos_token_id": 1,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 39,
    "max_sequence_length": 128,
    "mlp_hidden_size": 40,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_layers": 1,
    "pad_token_id": 1,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "transformers_version": "4.46.3",
    "use_cache": False,
    "vocab_size": 40,
    "weight_tying": False,
}
"""LLaDA-8B-Instruct's config.json."""
DREAM: dict[str, Any] = {
    "architectures": ["DreamModel"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    "bos_token_id": 1,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": 24,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "mask_token_id": 39,
    "max_position_embeddings": 128,
    "max_window_layers": 28,
    "model_type": "Dream",
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "pad_token_id": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.2",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 40,
}
"""DreamConfig's arguments, those of every configuration, and Qwen2.5's `use_mrope`."""
OF_DFACTORY = {
    "use_rmsnorm": True,
    "norm_softmax": False,
    "rotary_dim": 4,
    "using_split_qkv_in_self_attention": False,
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "pad_token_id": 1,
}
"""Fields of inclusionAI/dFactory's config.json of LLaDA2-mini and -flash that the release lacks."""
OF_EVERY_SAVED_FILE = {
    "_name_or_path": "GSAI-ML/LLaDA-1.5",
    "_attn_implementation_autoset": True,
    "use_bfloat16": False,
}
ILLADA = {
    name: value for name, value in DREAM.items() if "window" not in name and name not in ("auto_map", "use_mrope")
}

PUBLISHED = {
    "LLaDA": LLADA,
    "LLaDA-1.5": LLADA | OF_EVERY_SAVED_FILE,
    "iLLaDA": ILLADA | {"model_type": "illada", "mlp_bias": False, "pretraining_tp": 1},
    "Dream": DREAM,
    "LLaDA-MoE": LLADA_MOE | {"mask_token_id": 39, "pad_token_id": 1, "eos_token_id": 1},
    "LLaDA2.0": LLADA2,
    "LLaDA2 of dFactory": LLADA2 | OF_DFACTORY,
}


def write(folder: Path, fields: dict[str, Any]) -> str:
    (folder / "config.json").write_text(json.dumps(fields))
    return str(folder)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configuration_is_accepted_with_null_fields(name: str, tmp_path: Path) -> None:
    more = {"new_option": None, "eot_token_id": 3, "temperature": 0.7}
    model = backbone_on_meta(write(tmp_path, PUBLISHED[name] | more), dtype="float32")
    assert model.config.hidden_size == 24


@pytest.mark.parametrize("name", PUBLISHED)
def test_unknown_field_is_refused_by_name(name: str, tmp_path: Path) -> None:
    fields = PUBLISHED[name] | {"expert_capacity": 48, "block_size": 32}
    with pytest.raises(
        ValueError, match=r"aren't known: block_size=32, expert_capacity=48\. They may change its logits"
    ):
        backbone_on_meta(write(tmp_path, fields), dtype="float32")


def test_llama_and_qwen_take_what_transformers_takes(tmp_path: Path) -> None:
    fields = ILLADA | {"model_type": "llama", "trained_with": "a tool"}
    assert backbone_on_meta(write(tmp_path, fields), dtype="float32").config.hidden_size == 24
