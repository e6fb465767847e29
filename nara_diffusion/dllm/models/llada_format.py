"""LLaDA's and iLLaDA's checkpoints: a Llama with other names of fields and tensors."""

from __future__ import annotations

import re
from typing import Any

# Names of tensors: (in LLaDA, in LlamaForCausalLM), of the whole model and of a layer
_OF_MODEL = (("wte", "model.embed_tokens"), ("ln_f", "model.norm"), ("ff_out", "lm_head"))
_OF_LAYER = (
    ("attn_norm", "input_layernorm"),
    ("ff_norm", "post_attention_layernorm"),
    ("q_proj", "self_attn.q_proj"),
    ("k_proj", "self_attn.k_proj"),
    ("v_proj", "self_attn.v_proj"),
    ("attn_out", "self_attn.o_proj"),
    ("ff_proj", "mlp.gate_proj"),
    ("up_proj", "mlp.up_proj"),
    ("ff_out", "mlp.down_proj"),
)
_LAYER = r"(\d+)"
_TENSORS = [
    *((f"model.transformer.{theirs}.", f"{ours}.") for theirs, ours in _OF_MODEL),
    *(
        (f"model.transformer.blocks.{_LAYER}.{theirs}.", f"model.layers.{_LAYER}.{ours}.")
        for theirs, ours in _OF_LAYER
    ),
]
KEY_MAPPING = {
    "^" + theirs.replace(".", r"\."): ours.replace(_LAYER, r"\1") for theirs, ours in _TENSORS
}
"""For `from_pretrained(key_mapping=…)`, which allows one capture group in a pattern."""


def llama_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a LlamaConfig for those of a LLaDA checkpoint's config.json."""
    width, heads = fields["d_model"], fields["n_heads"]
    theta = fields.get("rope_theta", 10000.0)
    llama = {
        "vocab_size": fields.get("embedding_size") or fields["vocab_size"],
        "hidden_size": width,
        "intermediate_size": fields.get("mlp_hidden_size") or fields.get("mlp_ratio", 4) * width,
        "num_hidden_layers": fields["n_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("n_kv_heads") or heads,
        "max_position_embeddings": fields["max_sequence_length"],
        "rms_norm_eps": fields.get("rms_norm_eps", 1e-5),
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "attention_dropout": fields.get("attention_dropout", 0.0),
        "tie_word_embeddings": fields.get("weight_tying", True),  # LLaDA's own default
        "eos_token_id": fields.get("eos_token_id"),
        "bos_token_id": fields.get("bos_token_id"),
    }
    for name in ("dtype", "torch_dtype", "quantization_config"):
        if name in fields:
            llama[name] = fields[name]
    return llama


def checkpoint_name(name: str) -> str:
    """Return the name in a LLaDA checkpoint of a LlamaForCausalLM tensor."""
    for theirs, ours in _TENSORS:
        match = re.match(ours, name)
        if match:
            return theirs.replace(_LAYER, "".join(match.groups())) + name[match.end() :]
    return name
