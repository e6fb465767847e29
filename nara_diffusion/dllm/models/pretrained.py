"""Load masked language models into stock transformers classes.

| checkpoint                   | class                   | note                              |
|------------------------------|-------------------------|-----------------------------------|
| LLaDA, iLLaDA                | LlamaForCausalLM        | tensors renamed while loading     |
| LLaDA2                       | LLaDA2ForCausalLM       | tensors renamed; `block_causal`   |
| LLaDA-MoE                    | Qwen3MoeForCausalLM     | attention made bidirectional      |
| DiffusionGemma               | …ForBlockDiffusion      | unchanged; no mask token          |
| Dream                        | ShiftedQwen2ForCausalLM | `qwen_formats`                    |
| SDAR, TraDo, Fast-dLLM v2    | Block…, ShiftedBlock…   | `qwen_formats`, `block_causal`    |
| A2D, Qwen2, Qwen3, Qwen3-MoE | …ForCausalLM, Block…    | `qwen_formats`                    |
| Llama, RND1                  | their …ForCausalLM      | attention made bidirectional      |
| BERT, RoBERTa, ModernBERT, … | AutoModelForMaskedLM    | unchanged                         |

`config.is_causal = False` makes attention bidirectional in transformers. No code of the checkpoint
is run. Options of config.json that the stock class can't express are an error, and so are unknown
ones (`config_fields`).

The formats of LLaDA, and of LLaDA2 and LLaDA-MoE, are in `llada_format` and `mixture_formats`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    DiffusionGemmaForBlockDiffusion,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import CONFIG_NAME

from nara_diffusion.noise.blocks import LLADA2
from nara_diffusion.utils.quantised import check_roundable, quantization
from nara_diffusion.utils.repositories import naming_source

from . import config_fields
from .llada_format import KEY_MAPPING, checkpoint_name, llama_fields
from .mixture_formats import (
    LLaDA2MoeConfig,
    llada2_fields,
    qwen3_moe_fields,
    register_conversions,
)
from .model_classes import LLaDA2ForCausalLM
from .qwen_formats import FORMATS, qwen_class_and_fields
from .tokenizer_loading import find_mask_token, load_tokenizer, set_special_tokens

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

REFUSED = {
    "llava_llada": "LLaDA-V reads images",
    "mmada": "MMaDA reads and makes images",
    "nemotron_labs_diffusion": "Nemotron-Labs-Diffusion is trained with an autoregressive loss beside its own",
    "wedlm": "WeDLM has causal attention and fills a window of tokens in a changed order",
}
"""{model_type: the reason why it can't be loaded}"""

# Heads that encoders are pre-trained with, or fine-tuned with for another task.
_OTHER_HEADS = re.compile(
    r"(^|\.)(pooler|seq_relationship|sop_classifier)\.|^(classifier|score|qa_outputs)\."
)


def load_backbone(
    pretrained_model_name_or_path: str,
    *,
    mask_token_id: int | None = None,
    mask_token: str | None = None,
    block_length: int | None = None,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    **kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a masked-diffusion language model, or an encoder, and its tokenizer.

    `model(input_ids, attention_mask).logits[:, i]` predicts token i; attention is bidirectional, in
    the whole text or by blocks; `model.config.mask_token_id`, `pad_token_id` and `eos_token_id` are set.

    Args:
        pretrained_model_name_or_path: a folder or a repository on the Hub.
        mask_token_id: the mask token, if the checkpoint doesn't name it.
        mask_token: the same, by its text.
        block_length: the number of positions in a block, for models with attention by blocks. Give
            it for dLLM's A2D models that were trained with block diffusion, since their files don't
            say so. It is saved with the model.
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
    if block_length is not None:
        if fields.get("model_type", "").lower() not in {*FORMATS, LLADA2}:
            raise ValueError(
                f"block_length is {block_length}, but {name} isn't of a family that has attention "
                "by blocks: leave it out (generate and dllm.py take the block_length of sampling)"
            )
        fields["block_length"] = block_length
    model_class, config, is_renamed = _class_and_config(name, fields, hub)
    tokenizer = load_tokenizer(name, family=fields.get("model_type", ""), **hub)
    mask = None
    if fields.get("model_type") != "diffusion_gemma":  # that one has random tokens
        mask = find_mask_token(
            name, tokenizer, fields, config.vocab_size, mask_token_id, mask_token
        )
    if is_renamed:
        kwargs["key_mapping"] = KEY_MAPPING
    if load_in_4bit or load_in_8bit:
        check_roundable(config)
        kwargs["quantization_config"] = quantization(
            load_in_4bit, load_in_8bit, kwargs.get("dtype")
        )
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
    if family in REFUSED:
        raise ValueError(f"{name} isn't supported: {REFUSED[family]}")
    if family == "diffusion_gemma":
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **hub)
        return DiffusionGemmaForBlockDiffusion, config, False
    if family in FORMATS:
        model_class, config_class, fields = qwen_class_and_fields(family, fields)
        return model_class, _bidirectional(config_class, fields), False
    if family == LLADA2:
        register_conversions()
        return LLaDA2ForCausalLM, _bidirectional(LLaDA2MoeConfig, llada2_fields(fields)), False
    if "expert_intermediate_size" in fields:  # LLaDA-MoE has LLaDA's model_type
        return Qwen3MoeForCausalLM, _bidirectional(Qwen3MoeConfig, qwen3_moe_fields(fields)), False
    if family == "rnd1":
        config_fields.RND1.check(fields, Qwen3MoeConfig)
        fields = {key: value for key, value in fields.items() if value is not False}
        return Qwen3MoeForCausalLM, _bidirectional(Qwen3MoeConfig, fields), False
    if family in ("llada", "illada", "llama"):
        if family != "llama":
            config_fields.LLADA.check(fields, LlamaConfig)
        fields = llama_fields(fields) if "d_model" in fields else fields
        return LlamaForCausalLM, _bidirectional(LlamaConfig, fields), family != "llama"
    if family in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not fields.get("is_encoder_decoder"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **hub)
        return AutoModelForMaskedLM, config, False
    raise ValueError(
        f"{name} has model_type {family!r}. load_backbone knows LLaDA, iLLaDA, LLaDA-MoE, LLaDA2, "
        "DiffusionGemma, Dream, SDAR, TraDo, Fast-dLLM v2, A2D, RND1, Llama, Qwen2, Qwen3, Qwen3-MoE and the "
        "encoders of AutoModelForMaskedLM (BERT, RoBERTa, ModernBERT, …), and runs no code of a checkpoint"
    )


def _bidirectional(
    config_class: type[PreTrainedConfig], fields: Mapping[str, Any]
) -> PreTrainedConfig:
    if fields.get("use_sliding_window"):
        raise ValueError(
            "use_sliding_window=True isn't supported: attention has to see the whole sequence in "
            "both directions"
        )
    foreign = (
        "model_type",
        "architectures",
        "auto_map",
        "transformers_version",
        "attn_implementation",
    )
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
    for key, shape, expected in sorted(loading["mismatched_keys"]):
        misshapen.append(f"{original(key)} {tuple(shape)} instead of {tuple(expected)}")
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
