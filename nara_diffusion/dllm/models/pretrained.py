"""Load masked language models into stock transformers classes.

| checkpoint                   | class                   | note                              |
|------------------------------|-------------------------|-----------------------------------|
| LLaDA, iLLaDA                | LlamaForCausalLM        | tensors renamed while loading     |
| LLaDA2                       | LLaDA2ForCausalLM       | tensors renamed; `block_causal`   |
| LLaDA-MoE                    | Qwen3MoeForCausalLM     | attention made bidirectional      |
| DiffusionGemma               | …ForBlockDiffusion      | unchanged; no mask token          |
| Dream                        | ShiftedQwen2ForCausalLM | position i predicts token i       |
| Llama, Qwen2, Qwen3-MoE      | their …ForCausalLM      | attention made bidirectional      |
| BERT, RoBERTa, ModernBERT, … | AutoModelForMaskedLM    | unchanged                         |

`config.is_causal = False` makes attention bidirectional in transformers. No code of the checkpoint
is run. Options of config.json that the stock class can't express are an error, and so are unknown
ones (`config_fields`).

LLaDA is bit for bit a Llama with other tensor names. LLaDA2 and LLaDA-MoE are mixtures of experts.
LLaDA2 routes by a sigmoid, with groups, a bias for the choice and a shared expert; LLaDA-MoE by a
softmax. LLaDA2's fused q, k and v are split, and the experts of a layer are stacked while they
stream from disk; a saved copy has the names of the public checkpoints again. Routers aren't linear
layers, and experts are stacked parameters: adapters on linear layers change neither.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    DiffusionGemmaForBlockDiffusion,
    Glm4MoeConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import Split, WeightConverter, WeightRenaming
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import CONFIG_NAME

from nara_diffusion.noise.blocks import LLADA2
from nara_diffusion.utils.repositories import naming_source

from ..tokenizer import find_mask_token, load_tokenizer, set_special_tokens
from . import config_fields
from .block_causal import LLaDA2ForCausalLM
from .quantised import check_roundable, quantization
from .shifted_logits import ShiftedQwen2ForCausalLM

HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)
"""Arguments of from_pretrained that say where the files are."""

# Heads that encoders are pre-trained with, or fine-tuned with for another task.
_OTHER_HEADS = re.compile(
    r"(^|\.)(pooler|seq_relationship|sop_classifier)\.|^(classifier|score|qa_outputs)\."
)


def load_backbone(
    pretrained_model_name_or_path: str,
    *,
    mask_token_id: int | None = None,
    mask_token: str | None = None,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    **kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a masked-diffusion language model, or an encoder, and its tokenizer.

    `model(input_ids, attention_mask).logits[:, i]` predicts token i; attention is bidirectional;
    `model.config.mask_token_id`, `pad_token_id` and `eos_token_id` are set.

    Args:
        pretrained_model_name_or_path: a folder or a repository on the Hub.
        mask_token_id: the mask token, if the checkpoint doesn't name it.
        mask_token: the same, by its text.
        load_in_4bit: quantise the linear layers' weights with bitsandbytes: NF4 with double
            quantisation, computed in `dtype`. For other settings pass a `quantization_config`.
        load_in_8bit: the same in 8 bits.
        **kwargs: of `from_pretrained`: dtype, device_map, quantization_config, attn_implementation,
            revision, token, …

    Raises:
        ValueError: nothing is there, an unknown kind of checkpoint, options that the stock class
            lacks, tensors that are missing, unknown or of another shape, damaged files, or no mask
            token.
    """
    name = pretrained_model_name_or_path
    hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
    fields = _config_fields(name, hub)
    model_class, config, is_renamed = _class_and_config(name, fields, hub)
    tokenizer = load_tokenizer(name, family=fields.get("model_type", ""), **hub)
    mask = None
    if fields.get("model_type") != "diffusion_gemma":  # that one has random tokens
        size = config.vocab_size
        mask = find_mask_token(name, tokenizer, fields, size, mask_token_id, mask_token)
    if is_renamed:
        kwargs["key_mapping"] = _KEY_MAPPING
    if load_in_4bit or load_in_8bit:
        check_roundable(config)
        dtype = kwargs.get("dtype")
        kwargs["quantization_config"] = quantization(load_in_4bit, load_in_8bit, dtype)
    try:
        model, loading = model_class.from_pretrained(
            name, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    except SafetensorError as error:
        raise ValueError(
            f"The weights of {name} are cut off or damaged ({error}): download them again."
        ) from None
    _check_tensors(name, loading, checkpoint_name if is_renamed else str)
    if is_renamed:
        del model._weight_conversions  # saved copies have the names of the class
    set_special_tokens(model, tokenizer, mask)
    return model, tokenizer


def backbone_on_meta(name: str, dtype: torch.dtype, **hub: Any) -> PreTrainedModel:
    """Return the model that `load_backbone` loads, on the meta device: from its config.json only.

    Its mask token is 0. Raises ValueError as `load_backbone` does.
    """
    model_class, config, _ = _class_and_config(name, _config_fields(name, hub), hub)
    with torch.device("meta"):
        model = model_class._from_config(config, dtype=dtype)
    model.config.mask_token_id = 0
    return model.requires_grad_(False)


def _config_fields(name: str, hub: Mapping[str, Any]) -> dict[str, Any]:
    folder = Path(name, hub.get("subfolder") or "")
    with naming_source(folder, CONFIG_NAME, "a model of transformers"):
        fields, _ = PreTrainedConfig.get_config_dict(name, **hub)
        if not fields:
            raise ValueError(f"it has no {CONFIG_NAME}")
    return fields


def _class_and_config(
    name: str, fields: dict[str, Any], hub: Mapping[str, Any]
) -> tuple[Any, PreTrainedConfig, bool]:
    """Return the class, the configuration, and whether the tensors have LLaDA's names."""
    family = fields.get("model_type", "").lower()
    shifted = fields.get("shifted_logits", family == "dream")
    if family == "diffusion_gemma":
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **hub)
        return DiffusionGemmaForBlockDiffusion, config, False
    if family in ("dream", "qwen2"):
        if family == "dream":
            config_fields.DREAM.check(fields, Qwen2Config)
        if not shifted:
            return Qwen2ForCausalLM, _bidirectional(Qwen2Config, fields), False
        fields = {**fields, "shifted_logits": True}  # a saved copy is read as this class again
        return ShiftedQwen2ForCausalLM, _bidirectional(Qwen2Config, fields), False
    if family == LLADA2:
        _register_conversions()
        return LLaDA2ForCausalLM, _bidirectional(LLaDA2MoeConfig, _llada2_fields(fields)), False
    if "expert_intermediate_size" in fields:  # LLaDA-MoE has LLaDA's model_type
        return Qwen3MoeForCausalLM, _bidirectional(Qwen3MoeConfig, _qwen3_moe_fields(fields)), False
    if family == "qwen3_moe":
        return Qwen3MoeForCausalLM, _bidirectional(Qwen3MoeConfig, fields), False
    if family in ("llada", "illada", "llama"):
        if family != "llama":
            config_fields.LLADA.check(fields, LlamaConfig)
        fields = _llama_fields(fields) if "d_model" in fields else fields
        return LlamaForCausalLM, _bidirectional(LlamaConfig, fields), family != "llama"
    if family in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not fields.get("is_encoder_decoder"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **hub)
        return AutoModelForMaskedLM, config, False
    raise ValueError(
        f"{name} has model_type {family!r}. load_backbone knows LLaDA, iLLaDA, LLaDA-MoE, "
        "LLaDA2, DiffusionGemma, Dream, Llama, Qwen2, Qwen3-MoE and the encoders of AutoModelForMaskedLM (BERT, "
        "RoBERTa, ModernBERT, …), and runs no code of a checkpoint"
    )


def _bidirectional(
    config_class: type[PreTrainedConfig], fields: Mapping[str, Any]
) -> PreTrainedConfig:
    if fields.get("use_sliding_window"):
        raise ValueError(
            "use_sliding_window=True isn't supported: attention has to see the whole sequence in "
            "both directions"
        )
    foreign = ("model_type", "architectures", "auto_map", "transformers_version")
    config = config_class(**{key: value for key, value in fields.items() if key not in foreign})
    config.is_causal = False  # read by transformers' masks and attention functions
    config.use_cache = False
    # with a padding token, nn.Embedding would give its row no gradient; set_special_tokens sets it
    # later
    config.pad_token_id = None
    return config


def _check_tensors(name: str, loading: Mapping[str, Any], original: Callable[[str], str]) -> None:
    """Raise ValueError if a checkpoint's tensors don't fit the model; transformers only logs it.

    `original` turns a tensor's name in the model into that in the checkpoint.
    """
    unknown = [key for key in loading["unexpected_keys"] if not _OTHER_HEADS.search(key)]
    misshapen = []
    for key, found, expected in sorted(loading["mismatched_keys"]):
        misshapen.append(f"{original(key)} {tuple(found)} instead of {tuple(expected)}")
    problems = {
        "missing": sorted(map(original, loading["missing_keys"])),
        "not known to the model": sorted(map(original, unknown)),
        "of another shape": misshapen,
    }
    lists = []
    for kind, keys in problems.items():
        if keys:
            lists.append(f"{len(keys)} {kind}: {', '.join(keys[:8])}")
    if lists:
        raise ValueError(f"the tensors of {name} don't fit its configuration; {'; '.join(lists)}")


# ---------------------------------------------------------------- LLaDA


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

_KEY_MAPPING = {
    "^" + theirs.replace(".", r"\."): ours.replace(_LAYER, r"\1") for theirs, ours in _TENSORS
}
"""For `from_pretrained(key_mapping=…)`, which allows one capture group in a pattern."""


def _llama_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a LlamaConfig for those of a LLaDA checkpoint's config.json."""
    width, heads = fields["d_model"], fields["n_heads"]
    theta = fields.get("rope_theta", 10000.0)
    found = {
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
            found[name] = fields[name]
    return found


def checkpoint_name(name: str) -> str:
    """Return the name in a LLaDA checkpoint of a LlamaForCausalLM tensor."""
    for theirs, ours in _TENSORS:
        found = re.match(ours, name)
        if found:
            return theirs.replace(_LAYER, "".join(found.groups())) + name[found.end() :]
    return name


# ---------------------------------------------------------------- LLaDA2 and LLaDA-MoE


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


def _register_conversions() -> None:
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


def _llada2_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a LLaDA2MoeConfig for those of a LLaDA2 checkpoint's config.json.

    Raises:
        ValueError: a field is unknown, or has a value that Glm4Moe can't express.
    """
    config_fields.LLADA2.check(fields, LLaDA2MoeConfig)
    found = dict(fields)
    if not found.get("num_shared_experts", found.get("n_shared_experts", 1)):
        raise ValueError("this LLaDA2 checkpoint has no shared expert, which Glm4Moe always has")
    # LLaDA2 scales the weights of several experts to a sum, and leaves that of one
    found["norm_topk_prob"] = found["num_experts_per_tok"] > 1
    found.setdefault("tie_word_embeddings", False)
    return found


def _qwen3_moe_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
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
