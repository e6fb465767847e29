"""Load masked language models into stock transformers classes, with their tokenizers.

| checkpoint                   | class                   | note                              |
|------------------------------|-------------------------|-----------------------------------|
| LLaDA, iLLaDA                | LlamaForCausalLM        | tensors renamed while loading     |
| LLaDA2                       | LLaDA2ForCausalLM       | tensors renamed                   |
| LLaDA-MoE                    | Qwen3MoeForCausalLM     | attention made bidirectional      |
| DiffusionGemma               | …ForBlockDiffusion      | unchanged; no mask token          |
| Dream                        | ShiftedQwen2ForCausalLM | logits moved by one position      |
| SDAR, TraDo, Fast-dLLM v2    | Block…, ShiftedBlock…   | attention by blocks               |
| A2D, Qwen2, Qwen3, Qwen3-MoE | …ForCausalLM, Block…    | by blocks if `block_length` is set |
| Llama, RND1                  | their …ForCausalLM      | attention made bidirectional      |
| BERT, RoBERTa, ModernBERT, … | AutoModelForMaskedLM    | unchanged                         |

`config.is_causal = False` makes attention bidirectional in transformers. No code of the checkpoint
is run. Options of config.json that the stock class can't express are an error, and so are unknown
ones (`config_fields`). The families' formats are in `checkpoint_formats`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import CONFIG_NAME

from nara_diffusion.utils.quantised import check_roundable, quantization
from nara_diffusion.utils.repositories import naming_source

from .checkpoint_formats import GEMMA, class_and_config

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

# Mask tokens that no file of a checkpoint names: of LLaDA2 and LLaDA-MoE, SDAR, and Fast-dLLM v2
_MASKS = ("<|mask|>", "<|MASK|>", "|<MASK>|")
# {model_type: the stock class for its files}, for checkpoints that may name their own class
_STOCK_TOKENIZERS: dict[str, type[PreTrainedTokenizerBase]] = {
    "llada": PreTrainedTokenizerFast,
    "illada": PreTrainedTokenizerFast,
    "llada2_moe": PreTrainedTokenizerFast,
    "lladamoe": PreTrainedTokenizerFast,
    "dream": Qwen2Tokenizer,
    "sdar": PreTrainedTokenizerFast,
    "sdar_moe": PreTrainedTokenizerFast,
    "fast_dllm_qwen": PreTrainedTokenizerFast,
    "a2d-qwen2": PreTrainedTokenizerFast,
    "a2d-qwen3": PreTrainedTokenizerFast,
    "rnd1": PreTrainedTokenizerFast,
}
# The class that transformers 5 names if tokenizer.json holds the whole tokenizer
_WHOLE_IN_ITS_FILE = "TokenizersBackend"

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
        fields["block_length"] = block_length
    model_class, config, key_mapping = class_and_config(name, fields, hub)
    tokenizer = load_tokenizer(name, family=fields.get("model_type", ""), **hub)
    mask = None
    if fields.get("model_type") != GEMMA:  # that one has random tokens
        mask = find_mask_token(
            name, tokenizer, fields, config.vocab_size, mask_token_id, mask_token
        )
    if load_in_4bit or load_in_8bit:
        check_roundable(config)
        kwargs["quantization_config"] = quantization(
            load_in_4bit, load_in_8bit, kwargs.get("dtype")
        )
    try:
        model, loading = model_class.from_pretrained(
            name,
            config=config,
            key_mapping=key_mapping,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **kwargs,
        )
    except SafetensorError as error:
        raise ValueError(
            f"The weights of {name} are cut off or damaged ({error}): download them again."
        ) from None
    _check_tensors(name, loading)
    if key_mapping:
        del model._weight_conversions  # saved copies have the names of the class
    set_special_tokens(model, tokenizer, mask)
    return model, tokenizer


def backbone_on_meta(name: str, dtype: torch.dtype, **hub: Any) -> PreTrainedModel:
    """Return the model that `load_backbone` loads, on the meta device: from its config.json only.

    Its mask token is 0. Raises ValueError as `load_backbone` does.
    """
    model_class, config, _ = class_and_config(name, _config_fields(name, hub), hub)
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


def _check_tensors(name: str, loading: Mapping[str, Any]) -> None:
    """Raise ValueError if a checkpoint's tensors don't fit the model; transformers only logs it."""
    unknown = [key for key in loading["unexpected_keys"] if not _OTHER_HEADS.search(key)]
    problems = {
        "missing": loading["missing_keys"],
        "not known to the model": unknown,
        "of another shape": [key for key, _, _ in loading["mismatched_keys"]],
    }
    lists = [
        f"{len(keys)} {kind}: {', '.join(sorted(keys)[:8])}"
        for kind, keys in problems.items()
        if keys
    ]
    if lists:
        raise ValueError(f"the tensors of {name} don't fit its configuration; {'; '.join(lists)}")


def load_tokenizer(name: str, *, family: str, **hub: Any) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer without running its code or asking on the terminal.

    `family` is the checkpoint's model_type.

    Raises:
        ValueError: the tokenizer is missing or damaged.
    """
    try:
        stock = _STOCK_TOKENIZERS.get(family.lower())
        if stock is None:
            named = get_tokenizer_config(name, **hub).get("tokenizer_class")
            # AutoTokenizer would choose the class by model type, and Qwen2's class splits texts by
            # its own rules
            stock = PreTrainedTokenizerFast if named == _WHOLE_IN_ITS_FILE else AutoTokenizer
        return stock.from_pretrained(name, trust_remote_code=False, **hub)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"The tokenizer of {name} can't be loaded: {reason} Are tokenizer.json and "
            "tokenizer_config.json there?"
        ) from error


def find_mask_token(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    fields: Mapping[str, Any],
    vocab_size: int,
    mask_token_id: int | None,
    mask_token: str | None,
) -> int:
    """Return the id of the mask token: as given, or else from config.json or the tokenizer.

    If none of these names a mask token, one that is usual and in the vocabulary is used.

    Raises:
        ValueError: there is no mask token, the given name isn't a token, or the id is outside the
            vocabulary.
    """
    mask: Any = mask_token_id
    if mask_token is not None:
        mask = tokenizer.get_vocab().get(mask_token)
        if mask is None:
            raise ValueError(
                f"mask_token {mask_token!r} isn't a token of {name}: name one from its vocabulary"
            )
    unnamed = [tokenizer.get_vocab().get(usual) for usual in _MASKS]
    candidates = (mask, fields.get("mask_token_id"), tokenizer.mask_token_id, *unnamed)
    mask = next((token for token in candidates if token is not None), None)
    if mask is None:
        raise ValueError(
            f"neither config.json nor the tokenizer of {name} names a mask token: call "
            "load_backbone(…, mask_token='…') or load_backbone(…, mask_token_id=N) with a token "
            "that no text contains, such as a reserved one"
        )
    if not 0 <= int(mask) < vocab_size:
        raise ValueError(
            f"mask_token_id {mask} is outside the vocabulary of {name} with {vocab_size} tokens"
        )
    return int(mask)


def set_special_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, mask_token_id: int | None
) -> None:
    """Make model and tokenizer agree on the mask (if any), BOS, EOS and padding tokens.

    If there is no padding token, EOS is used. BOS comes from the tokenizer, since the configuration
    of Dream gives its EOS token as BOS.
    """
    config: Any = model.config
    text: Any = tokenizer.convert_ids_to_tokens
    if mask_token_id is not None:
        config.mask_token_id = mask_token_id
    if tokenizer.bos_token_id is not None:
        config.bos_token_id = tokenizer.bos_token_id
    if mask_token_id is not None and tokenizer.mask_token_id != mask_token_id:
        tokenizer.mask_token = text(mask_token_id)
    # some configurations have no end token, others a default outside of the vocabulary
    configured = getattr(config, "eos_token_id", None)
    if isinstance(configured, list):
        configured = configured[0] if configured else None
    ends = (configured, tokenizer.eos_token_id, tokenizer.sep_token_id)
    end = next((token for token in ends if token is not None and text(token) is not None), None)
    if end is None or end != configured:
        config.eos_token_id = end
    for name in ("eos_token", "pad_token"):
        if getattr(tokenizer, name) is None and end is not None:
            setattr(tokenizer, name, text(end))
    config.pad_token_id = tokenizer.pad_token_id
    tokenizer.padding_side = "right"
