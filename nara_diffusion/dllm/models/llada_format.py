"""LLaDA's checkpoint format: a Llama under other names.

The tensors are those of a Llama, bit for bit, so loading one is a renaming of keys while they
stream from disk, and a translation of config.json. An option that Llama lacks is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
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
_TENSORS = [(f"model.transformer.{theirs}.", f"{ours}.") for theirs, ours in _OF_MODEL]
for theirs, ours in _OF_LAYER:
    theirs = f"model.transformer.blocks.{_LAYER}.{theirs}."
    _TENSORS.append((theirs, f"model.layers.{_LAYER}.{ours}."))

KEY_MAPPING = {
    "^" + theirs.replace(".", r"\."): ours.replace(_LAYER, r"\1") for theirs, ours in _TENSORS
}
"""For `from_pretrained(key_mapping=…)`, which allows one capture group in a pattern."""

# Fields of a LLaDA configuration: their values that make its block a Llama block
_EXPRESSIBLE: dict[str, tuple[Any, ...]] = {
    "activation_type": ("silu",),
    "block_type": ("llama",),
    "layer_norm_type": ("rms",),
    "rope": (True,),
    "layer_norm_with_affine": (True,),
    "alibi": (False,),
    "attention_layer_norm": (False,),
    "include_bias": (False,),
    "input_emb_norm": (False,),
    "scale_logits": (False,),
    "bias_for_layer_norm": (False, None),
    "include_qkv_bias": (False, None),
    "clip_qkv": (None,),
    "sliding_window": (None,),
    "embedding_dropout": (0.0,),
    "residual_dropout": (0.0,),
}


def llama_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a LlamaConfig for those of a LLaDA checkpoint's config.json.

    Raises:
        ValueError: a field is missing, or has a value that Llama can't express; the message names
            each.
    """
    check_expressible("LLaDA", "Llama", fields, _EXPRESSIBLE)
    try:
        return _translated(fields)
    except KeyError as error:
        raise ValueError(f"this LLaDA checkpoint's config.json lacks {error.args[0]}") from None


def check_expressible(
    kind: str, stock: str, fields: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]
) -> None:
    """Raise ValueError for fields with values that the stock class can't express.

    Args:
        kind: the checkpoint's kind.
        stock: the name of the stock class, without its ending.
        allowed: field → the values that the stock class expresses.
    """
    unsupported = []
    for name, values in allowed.items():
        if name in fields and fields[name] not in values:
            expected = " or ".join(map(repr, values))
            unsupported.append(f"{name}={fields[name]!r} (only {expected})")
    if unsupported:
        raise ValueError(
            f"this {kind} checkpoint has options that a stock {stock} model can't express: "
            + "; ".join(unsupported)
        )


def _translated(fields: dict[str, Any]) -> dict[str, Any]:
    width, heads = fields["d_model"], fields["n_heads"]
    # multi_query_attention is an older flag than n_kv_heads
    key_heads = 1 if fields.get("multi_query_attention") else heads
    theta = fields.get("rope_theta", 10000.0)
    found = {
        "vocab_size": fields.get("embedding_size") or fields["vocab_size"],
        "hidden_size": width,
        "intermediate_size": fields.get("mlp_hidden_size") or fields.get("mlp_ratio", 4) * width,
        "num_hidden_layers": fields["n_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("n_kv_heads") or key_heads,
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
            found[name] = fields[name]
    return found


def checkpoint_name(name: str) -> str:
    """Return the name in a LLaDA checkpoint of a LlamaForCausalLM tensor."""
    for theirs, ours in _TENSORS:
        found = re.match(ours, name)
        if found:
            return theirs.replace(_LAYER, "".join(found.groups())) + name[found.end() :]
    return name
