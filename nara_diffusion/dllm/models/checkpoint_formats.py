"""The formats of checkpoints: which stock class reads a config.json, and the names of the tensors.

A family is a row of `FORMATS`. A saved copy is read again as the same class, since its config.json
says `block_length` and `shifted_logits`. dLLM's A2D checkpoints don't say which attention they were
trained with, so they see the whole text unless `block_length` is given.

*LLaDA* and iLLaDA are a Llama with other names of fields and tensors.

*LLaDA2* routes by a sigmoid, with groups, a bias for the choice and a shared expert; *LLaDA-MoE* by
a softmax. LLaDA2's fused q, k and v are split, and the experts of a layer are stacked while they
stream from disk; a saved copy has the names of the public checkpoints again. Routers aren't linear
layers, and experts are stacked parameters: adapters on linear layers change neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    DiffusionGemmaForBlockDiffusion,
    Glm4MoeConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import Split, WeightConverter, WeightRenaming
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from nara_diffusion.noise.blocks import LLADA2

from . import config_fields
from .model_classes import (
    BlockQwen2ForCausalLM,
    BlockQwen3ForCausalLM,
    BlockQwen3MoeForCausalLM,
    LLaDA2ForCausalLM,
    ShiftedBlockQwen2ForCausalLM,
    ShiftedQwen2ForCausalLM,
)

GEMMA = "diffusion_gemma"
"""DiffusionGemma's `model_type`."""
REFUSED = {
    "llava_llada": "LLaDA-V reads images",
    "mmada": "MMaDA reads and makes images",
    "nemotron_labs_diffusion": "Nemotron-Labs-Diffusion is trained with an autoregressive loss beside its own",
    "wedlm": "WeDLM has causal attention and fills a window of tokens in a changed order",
}
"""{model_type: the reason why it can't be loaded}"""
_LAYER = r"^model\.transformer\.blocks\.(\d+)\."
KEY_MAPPING = {
    r"^model\.transformer\.wte\.": "model.embed_tokens.",
    r"^model\.transformer\.ln_f\.": "model.norm.",
    r"^model\.transformer\.ff_out\.": "lm_head.",
    rf"{_LAYER}attn_norm\.": r"model.layers.\1.input_layernorm.",
    rf"{_LAYER}ff_norm\.": r"model.layers.\1.post_attention_layernorm.",
    rf"{_LAYER}q_proj\.": r"model.layers.\1.self_attn.q_proj.",
    rf"{_LAYER}k_proj\.": r"model.layers.\1.self_attn.k_proj.",
    rf"{_LAYER}v_proj\.": r"model.layers.\1.self_attn.v_proj.",
    rf"{_LAYER}attn_out\.": r"model.layers.\1.self_attn.o_proj.",
    rf"{_LAYER}ff_proj\.": r"model.layers.\1.mlp.gate_proj.",
    rf"{_LAYER}up_proj\.": r"model.layers.\1.mlp.up_proj.",
    rf"{_LAYER}ff_out\.": r"model.layers.\1.mlp.down_proj.",
}
"""{tensors of LLaDA: tensors of LlamaForCausalLM}, for `from_pretrained(key_mapping=…)`.
It allows one capture group in a pattern."""

# LLaDA2's tensors become those of Glm4MoeForCausalLM, and back.
_CONVERSIONS = [
    *(get_checkpoint_conversion_mapping("qwen2_moe") or ()),  # it stacks experts
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
    block_length: int = 32


def _llama_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a LlamaConfig for those of LLaDA; iLLaDA has them already."""
    if "d_model" not in fields:
        return fields
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
    same = ("dtype", "torch_dtype", "quantization_config")
    return llama | {name: fields[name] for name in same if name in fields}


def _llada2_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a LLaDA2MoeConfig for those of LLaDA2."""
    if not fields.get("num_shared_experts", fields.get("n_shared_experts", 1)):
        raise ValueError("this LLaDA2 checkpoint has no shared expert, which Glm4Moe always has")
    # LLaDA2 scales the weights of several experts to a sum, and leaves that of one
    scales = fields["num_experts_per_tok"] > 1
    return {"tie_word_embeddings": False, **fields, "norm_topk_prob": scales}


def _qwen3_moe_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a Qwen3MoeConfig for those of LLaDA-MoE."""
    frequencies = fields.get("moe_layer_freq") or []
    heads = fields["num_attention_heads"]
    return {
        **fields,
        "head_dim": fields.get("head_dim") or fields["hidden_size"] // heads,
        "num_key_value_heads": fields.get("num_key_value_heads") or heads,
        "intermediate_size": fields.get("dense_intermediate_size") or fields["hidden_size"],
        "moe_intermediate_size": fields["expert_intermediate_size"],
        "mlp_only_layers": [layer for layer, number in enumerate(frequencies) if not number],
        "decoder_sparse_step": 1,
        "norm_topk_prob": bool(fields.get("norm_topk_prob")),
        "output_router_logits": False,
    }


def _without_false(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a Qwen3MoeConfig for those of RND1, which has False in place of None."""
    return {name: value for name, value in fields.items() if value is not False}


@dataclass(frozen=True)
class Format:
    """The form in which a family publishes its models.

    Attributes:
        config_class: the configuration of the class that reads them.
        published: the fields of config.json; None if they are those of the configuration.
        converted: a function from these fields to those of the configuration.
        block_field: the field with the length of the attention's blocks; the saved copy has
            `block_length`. "" if the family has no blocks.
        block_length: that length where the field is missing; None for attention to the whole text.
        is_shifted: True if position i predicts token i + 1.
        key_mapping: new names of the tensors.
    """

    config_class: type[PreTrainedConfig]
    published: config_fields.PublishedFields | None = None
    converted: Callable[[dict[str, Any]], dict[str, Any]] = dict
    block_field: str = ""
    block_length: int | None = None
    is_shifted: bool = False
    key_mapping: Mapping[str, str] | None = None


_LLADA = Format(LlamaConfig, config_fields.LLADA, _llama_fields, key_mapping=KEY_MAPPING)
_LLADA2 = Format(LLaDA2MoeConfig, config_fields.LLADA2, _llada2_fields, "block_length", 32)
FORMATS = {
    "llama": Format(LlamaConfig),
    "llada": _LLADA,
    "illada": _LLADA,
    "lladamoe": Format(Qwen3MoeConfig, config_fields.LLADA_MOE, _qwen3_moe_fields),
    LLADA2: _LLADA2,
    "rnd1": Format(Qwen3MoeConfig, config_fields.RND1, _without_false),
    "qwen2": Format(Qwen2Config, block_field="block_length"),
    "qwen3": Format(Qwen3Config, block_field="block_length"),
    "qwen3_moe": Format(Qwen3MoeConfig, block_field="block_length"),
    "a2d-qwen2": Format(Qwen2Config, block_field="block_length"),
    "a2d-qwen3": Format(Qwen3Config, block_field="block_length"),
    "dream": Format(Qwen2Config, config_fields.DREAM, dict, "block_length", is_shifted=True),
    "sdar": Format(Qwen3Config, config_fields.SDAR, dict, "block_size", 4),
    "sdar_moe": Format(Qwen3MoeConfig, config_fields.SDAR_MOE, dict, "block_size", 4),
    "fast_dllm_qwen": Format(Qwen2Config, config_fields.FAST_DLLM, dict, "bd_size", 32, True),
}
"""{model_type: format}. SDAR's row is TraDo's, too."""
_CLASSES: Mapping[tuple[type[PreTrainedConfig], bool, bool], type[PreTrainedModel]] = {
    (LlamaConfig, False, False): LlamaForCausalLM,
    (LLaDA2MoeConfig, True, False): LLaDA2ForCausalLM,
    (Qwen2Config, False, False): Qwen2ForCausalLM,
    (Qwen2Config, False, True): ShiftedQwen2ForCausalLM,
    (Qwen2Config, True, False): BlockQwen2ForCausalLM,
    (Qwen2Config, True, True): ShiftedBlockQwen2ForCausalLM,
    (Qwen3Config, False, False): Qwen3ForCausalLM,
    (Qwen3Config, True, False): BlockQwen3ForCausalLM,
    (Qwen3MoeConfig, False, False): Qwen3MoeForCausalLM,
    (Qwen3MoeConfig, True, False): BlockQwen3MoeForCausalLM,
}
"""{(configuration, attends by blocks, is shifted): class}"""
_UNCHANGED = {
    **dict.fromkeys(MODEL_FOR_MASKED_LM_MAPPING_NAMES, AutoModelForMaskedLM),
    GEMMA: DiffusionGemmaForBlockDiffusion,
}
"""{model_type: class} of models that are loaded as they are."""
_FOREIGN = (
    "model_type",
    "architectures",
    "auto_map",
    "transformers_version",
    "attn_implementation",
)


def class_and_config(
    name: str, fields: dict[str, Any], hub: Mapping[str, Any]
) -> tuple[Any, PreTrainedConfig, Mapping[str, str] | None]:
    """Return the class, the configuration, and the new names of the tensors, for a config.json.

    Raises:
        ValueError: an unknown family, an unknown field, a value that the class can't express, or
            blocks for a family that has none.
    """
    family = fields.get("model_type", "").lower()
    if family in REFUSED:
        raise ValueError(f"{name} isn't supported: {REFUSED[family]}")
    if "expert_intermediate_size" in fields and family != "qwen3_moe":
        family = "lladamoe"  # its files have LLaDA's model_type
    row = FORMATS.get(family)
    blocks = fields.get("block_length")
    if blocks and (row is None or not row.block_field):
        raise ValueError(
            f"block_length is {blocks}, but {name} isn't of a family that has attention by blocks: "
            "leave it out (generate and dllm.py take the block_length of sampling)"
        )
    if row is not None:
        return *_converted(row, fields), row.key_mapping
    if family in _UNCHANGED and not fields.get("is_encoder_decoder"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **hub)
        return _UNCHANGED[family], config, None
    raise ValueError(
        f"{name} has model_type {family!r}. load_backbone knows LLaDA, iLLaDA, LLaDA-MoE, LLaDA2, "
        "DiffusionGemma, Dream, SDAR, TraDo, Fast-dLLM v2, A2D, RND1, Llama, Qwen2, Qwen3, Qwen3-MoE and the "
        "encoders of AutoModelForMaskedLM (BERT, RoBERTa, ModernBERT, …), and runs no code of a checkpoint"
    )


def _converted(
    row: Format, fields: dict[str, Any]
) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """Return the class and the bidirectional configuration for the fields of a config.json."""
    if row.config_class is LLaDA2MoeConfig:
        register_checkpoint_conversion_mapping(LLADA2, _CONVERSIONS, overwrite=True)
    if row.published is not None:
        row.published.check(fields, row.config_class)
    blocks = fields.get("block_length") or fields.get(row.block_field) or row.block_length
    is_shifted = fields.get("shifted_logits", row.is_shifted)
    if fields.get("use_sliding_window"):
        raise ValueError(
            "use_sliding_window=True isn't supported: attention has to see the whole sequence in "
            "both directions"
        )
    names = fields.keys() - {row.block_field, *_FOREIGN}
    options = row.converted({key: fields[key] for key in fields if key in names})
    if blocks is not None:
        options["block_length"] = blocks
    if is_shifted:
        options["shifted_logits"] = True
    config = row.config_class(**options)
    config.is_causal = False  # read by transformers' masks and attention functions
    config.use_cache = False
    # with a padding token, nn.Embedding would give its row no gradient; set_special_tokens sets it
    # later
    config.pad_token_id = None
    return _CLASSES[row.config_class, blocks is not None, is_shifted], config
