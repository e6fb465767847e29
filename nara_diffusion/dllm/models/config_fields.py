"""The fields of published configurations, and which of their values a stock class expresses.

A field that isn't known may change the logits, as LLaDA2.2's `expert_capacity` does, so a checkpoint
with one is refused. Known are the fields of the stock class, those of every configuration of
transformers, and those that a family publishes. Fields without a value (null), token ids, and names
that begin with an underscore change no logits. This check is for families whose own code defines
their fields; for Llama, Qwen2 and Qwen3-MoE, transformers itself does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

_OF_TRANSFORMERS = (
    "attn_implementation auto_map dtype head_dim is_causal model_type quantization_config rope_scaling "
    "rope_theta torch_dtype transformers_version unsloth_version add_cross_attention "
    "cross_attention_hidden_size finetuning_task is_decoder output_attentions prefix pruned_heads "
    "sep_token task_specific_params tf_legacy_loss tie_encoder_decoder tokenizer_class torchscript "
    "use_bfloat16 min_length max_length do_sample top_k top_p temperature typical_p num_beams "
    "num_beam_groups diversity_penalty early_stopping length_penalty repetition_penalty"
)
"""Fields that any configuration may have, of transformers 4 too."""


@dataclass(frozen=True)
class PublishedFields:
    """The fields of one family.

    Attributes:
        family: its name in errors.
        stock: the name of the stock model in errors.
        expressible: the values of a field that the stock model expresses.
        harmless: more names, for fields that change no logits, or only together with the tensors:
            missing, unknown and misshapen tensors are refused elsewhere.
    """

    family: str
    stock: str
    expressible: Mapping[str, tuple[Any, ...]]
    harmless: str

    def check(self, fields: Mapping[str, Any], config_class: type[PreTrainedConfig]) -> None:
        """Raise ValueError for fields that are unknown, or have values that aren't expressible."""
        unsupported = [
            f"{name}={fields[name]!r} (only {' or '.join(map(repr, values))})"
            for name, values in self.expressible.items()
            if name in fields and fields[name] not in values
        ]
        if unsupported:
            raise ValueError(
                f"this {self.family} checkpoint has options that a stock {self.stock} model can't "
                "express: " + "; ".join(unsupported)
            )
        harmless = {*self.expressible, *self.harmless.split(), *_OF_TRANSFORMERS.split()}
        harmless |= config_class.attribute_map.keys()
        harmless |= config_class().to_dict().keys() | GenerationConfig().to_dict().keys()
        unknown = [
            f"{name}={value!r}"
            for name, value in fields.items()
            if name not in harmless
            and value is not None
            and not name.endswith(("_token_id", "_token_ids"))
            and not name.startswith("_")
        ]
        if unknown:
            raise ValueError(
                f"this {self.family} checkpoint has fields in config.json that aren't known: "
                f"{', '.join(sorted(unknown))}. They may change its logits: remove them only if you "
                "know that they don't."
            )


LLADA = PublishedFields(
    "LLaDA",
    "Llama",
    {
        "activation_type": ("silu",),
        "block_type": ("llama",),
        "layer_norm_type": ("rms",),
        "rope": (True,),
        "alibi": (False,),
        "input_emb_norm": (False,),
        "scale_logits": (False,),
        "clip_qkv": (None,),
        "sliding_window": (None,),
        "embedding_dropout": (0.0,),
        "residual_dropout": (0.0,),
    },
    (
        "alibi_bias_max attention_layer_norm attention_layer_norm_with_affine bias_for_layer_norm "
        "block_group_size d_model embedding_size flash_attention include_bias include_qkv_bias "
        "init_cutoff_factor init_device init_fn init_std layer_norm_with_affine max_sequence_length "
        "mlp_hidden_size mlp_ratio multi_query_attention n_heads n_kv_heads n_layers precision "
        "rope_full_precision weight_tying"
    ),
)
"""LLaDA, with names as in OLMo, and iLLaDA, with names as in transformers."""

LLADA_MOE = PublishedFields(
    "LLaDA-MoE",
    "Qwen3Moe",
    {
        "rope_scaling": (None,),
        "partial_rotary_factor": (1, None),
        "clip_qkv": (None,),
        "shared_expert_intermediate_size": (None,),
        "moe_router_score_function": ("softmax", None),
        "router_num_group": (None,),
        "routed_scaling_factor": (1.0, None),
    },
    (
        "dense_intermediate_size expert_intermediate_size moe_layer_freq qk_layernorm "
        "moe_router_enable_expert_bias router_topk_group"
    ),
)

LLADA2 = PublishedFields(
    "LLaDA2",
    "Glm4Moe",
    {
        "use_bias": (False,),
        "norm_head": (False,),
        "rope_scaling": (None,),
        "score_function": ("sigmoid", None),
        "num_nextn_predict_layers": (0, None),
        "norm_softmax": (False, None),
    },
    (
        "embedding_dropout max_window_layers moe_router_enable_expert_bias "
        "moe_shared_expert_intermediate_size mtp_loss_scaling_factor output_dropout "
        "partial_rotary_factor rotary_dim router_dtype sliding_window use_rmsnorm "
        "use_sliding_window using_split_qkv_in_self_attention"
    ),
)

DREAM = PublishedFields("Dream", "Qwen2", {"use_mrope": (False, None)}, "shifted_logits")

SDAR = PublishedFields(
    "SDAR",
    "Qwen3",
    {},
    (
        "block_length block_size debug ep_size fuse_cross_entropy micro_forward skip_checkpoint "
        "use_deepep"
    ),
)
"""SDAR and TraDo."""

SDAR_MOE = PublishedFields("SDAR", "Qwen3Moe", {}, "block_length block_size max_window_layers")

FAST_DLLM = PublishedFields(
    "Fast-dLLM v2", "Qwen2", {"attention_bias": (True, None)}, "bd_size block_length"
)

RND1 = PublishedFields(
    "RND1",
    "Qwen3Moe",
    {"rope_scaling": (None, False), "sliding_window": (None, False), "mlp_only_layers": ([],)},
    "max_window_layers moe_backend num_diffusion_steps",
)
