"""LLaDA's checkpoint format, read into stock Llama.

LLaDA is a Llama without the causal mask under other names, so its tensors are renamed while they stream from disk,
and its configuration is translated. What the translation can't express is refused by name, never dropped.
"""

from __future__ import annotations

import re
from typing import Any

# (in a LLaDA checkpoint, in LlamaForCausalLM), of the whole model and of a layer
_MODEL = (("wte", "model.embed_tokens"), ("ln_f", "model.norm"), ("ff_out", "lm_head"))
_LAYER = (
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
_TENSORS = [(f"model.transformer.{theirs}.", f"{ours}.") for theirs, ours in _MODEL] + [
    (f"model.transformer.blocks.(\\d+).{theirs}.", f"model.layers.(\\d+).{ours}.")
    for theirs, ours in _LAYER
]

KEY_MAPPING = {
    "^" + theirs.replace(".", r"\."): ours.replace(r"(\d+)", r"\1") for theirs, ours in _TENSORS
}
"""For `from_pretrained(key_mapping=…)`. Each pattern has one capture group at most: transformers takes no more."""

# Field: the values under which a LLaDA block is a Llama block.
_EXPRESSIBLE: dict[str, tuple[Any, ...]] = {
    "activation_type": ("silu",),
    "block_type": ("llama",),
    "layer_norm_type": ("rms",),
    **dict.fromkeys(("rope", "layer_norm_with_affine"), (True,)),
    **dict.fromkeys(
        ("alibi", "attention_layer_norm", "include_bias", "input_emb_norm", "scale_logits"),
        (False,),
    ),
    **dict.fromkeys(("bias_for_layer_norm", "include_qkv_bias"), (False, None)),
    **dict.fromkeys(("clip_qkv", "sliding_window"), (None,)),
    **dict.fromkeys(("embedding_dropout", "residual_dropout"), (0.0,)),
}


def llama_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a LlamaConfig by those of a LLaDA checkpoint's config.json.

    Raises:
        ValueError: a field is missing, or has a value that Llama can't express; the message names each.
    """
    unsupported = [
        f"{name}={fields[name]!r} (only {' or '.join(map(repr, allowed))})"
        for name, allowed in _EXPRESSIBLE.items()
        if name in fields and fields[name] not in allowed
    ]
    if unsupported:
        raise ValueError(
            "this LLaDA checkpoint has options that a stock Llama model can't express: "
            + "; ".join(unsupported)
        )
    try:
        d_model, n_heads = fields["d_model"], fields["n_heads"]
        one_or_all = (
            1 if fields.get("multi_query_attention") else n_heads
        )  # an older flag than n_kv_heads
        return dict(
            vocab_size=fields.get("embedding_size") or fields["vocab_size"],
            hidden_size=d_model,
            intermediate_size=fields.get("mlp_hidden_size") or fields.get("mlp_ratio", 4) * d_model,
            num_hidden_layers=fields["n_layers"],
            num_attention_heads=n_heads,
            num_key_value_heads=fields.get("n_kv_heads") or one_or_all,
            max_position_embeddings=fields["max_sequence_length"],
            rms_norm_eps=fields.get("rms_norm_eps", 1e-5),
            rope_parameters={
                "rope_type": "default",
                "rope_theta": fields.get("rope_theta", 10000.0),
            },
            attention_dropout=fields.get("attention_dropout", 0.0),
            tie_word_embeddings=fields.get(
                "weight_tying", True
            ),  # the default of LLaDA's own configuration class
            eos_token_id=fields.get("eos_token_id"),
            bos_token_id=fields.get("bos_token_id"),
            **{
                name: fields[name]
                for name in ("dtype", "torch_dtype", "quantization_config")
                if name in fields
            },
        )
    except KeyError as error:
        raise ValueError(f"this LLaDA checkpoint's config.json lacks {error.args[0]}") from None


def checkpoint_name(name: str) -> str:
    """The LLaDA checkpoint's name of a LlamaForCausalLM tensor."""
    for theirs, ours in _TENSORS:
        if found := re.match(ours, name):
            return theirs.replace(r"(\d+)", "".join(found.groups())) + name[found.end() :]
    return name
