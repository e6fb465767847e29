"""Checkpoints of LLaDA2 and LLaDA-MoE, mixtures of experts.

LLaDA2 routes by a sigmoid, with groups, a bias for the choice and a shared expert; LLaDA-MoE by a
softmax. LLaDA2's fused q, k and v are split, and the experts of a layer are stacked while they
stream from disk; a saved copy has the names of the public checkpoints again. Routers aren't linear
layers, and experts are stacked parameters: adapters on linear layers change neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import (
    Glm4MoeConfig,
    Qwen3MoeConfig,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import Split, WeightConverter, WeightRenaming

from nara_diffusion.noise.blocks import LLADA2

from . import config_fields

BLOCK_LENGTH = 32
"""LLaDA2's published length of a block, in tokens."""


class LLaDA2MoeConfig(Glm4MoeConfig):
    """The configuration of LLaDA2 for Glm4MoeForCausalLM, with LLaDA2's names and defaults.

    `block_length` is the length of the blocks that its attention and its generation go by.
    """

    model_type = LLADA2
    attribute_map: ClassVar[dict[str, str]] = {
        **Glm4MoeConfig.attribute_map,
        "num_experts": "n_routed_experts",
        "num_shared_experts": "n_shared_experts",
        "use_qkv_bias": "attention_bias",
    }
    n_group: int = 8
    topk_group: int = 4
    routed_scaling_factor: float = 2.5
    first_k_dense_replace: int = 0
    use_qk_norm: bool = True
    num_mtp_layers: int = 0
    block_length: int = BLOCK_LENGTH


def register_conversions() -> None:
    """Tell transformers how LLaDA2's tensors become those of Glm4MoeForCausalLM, and back."""
    stacking = get_checkpoint_conversion_mapping("qwen2_moe")
    assert stacking is not None
    conversions = [
        *stacking,
        WeightRenaming(r"^model\.word_embeddings\.", "model.embed_tokens."),
        WeightRenaming(r"\.attention\.", ".self_attn."),
        WeightConverter(
            source_patterns="query_key_value",
            target_patterns=["q_proj", "k_proj", "v_proj"],
            operations=[Split(dim=0)],
        ),
        WeightRenaming(r"\.self_attn\.dense\.", ".self_attn.o_proj."),
        WeightRenaming(r"\.self_attn\.query_layernorm\.", ".self_attn.q_norm."),
        WeightRenaming(r"\.self_attn\.key_layernorm\.", ".self_attn.k_norm."),
        WeightRenaming(r"\.mlp\.gate\.expert_bias", ".mlp.gate.e_score_correction_bias"),
    ]
    register_checkpoint_conversion_mapping(LLADA2, conversions, overwrite=True)


def llada2_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a LLaDA2MoeConfig for those of a LLaDA2 checkpoint's config.json.

    Raises:
        ValueError: a field is unknown, or has a value that Glm4Moe can't express.
    """
    config_fields.LLADA2.check(fields, LLaDA2MoeConfig)
    moe_fields = dict(fields)
    if not moe_fields.get("num_shared_experts", moe_fields.get("n_shared_experts", 1)):
        raise ValueError("this LLaDA2 checkpoint has no shared expert, which Glm4Moe always has")
    # LLaDA2 scales the weights of several experts to a sum, and leaves that of one
    moe_fields["norm_topk_prob"] = moe_fields["num_experts_per_tok"] > 1
    moe_fields.setdefault("tie_word_embeddings", False)
    return moe_fields


def qwen3_moe_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a Qwen3MoeConfig for those of a LLaDA-MoE checkpoint's config.json.

    Raises:
        ValueError: a field is unknown, or has a value that Qwen3Moe can't express.
    """
    config_fields.LLADA_MOE.check(fields, Qwen3MoeConfig)
    layers = fields["num_hidden_layers"]
    frequencies = fields.get("moe_layer_freq") or [1] * layers
    dense = [layer for layer, frequency in enumerate(frequencies) if not frequency]
    heads = fields["num_attention_heads"]
    return {
        **fields,
        "head_dim": fields.get("head_dim") or fields["hidden_size"] // heads,
        "num_key_value_heads": fields.get("num_key_value_heads") or heads,
        "intermediate_size": fields.get("dense_intermediate_size") or fields["hidden_size"],
        "moe_intermediate_size": fields["expert_intermediate_size"],
        "mlp_only_layers": dense,
        "decoder_sparse_step": 1,
        "norm_topk_prob": bool(fields.get("norm_topk_prob")),
        "output_router_logits": False,
    }
