"""Loading masked language models into stock transformers classes.

| checkpoint                   | class                   | note                                                  |
|------------------------------|-------------------------|-------------------------------------------------------|
| LLaDA, iLLaDA                | LlamaForCausalLM        | tensors renamed while they stream (`llada_format`)    |
| Dream                        | ShiftedQwen2ForCausalLM | position i predicts token i (`shifted_logits`)        |
| Llama, Qwen2                 | their …ForCausalLM      | attention made bidirectional                          |
| BERT, RoBERTa, ModernBERT, … | AutoModelForMaskedLM    | as they are                                           |

`config.is_causal = False` is what makes attention bidirectional in transformers. No code from the checkpoint is run.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import prepare_model_for_kbit_training
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import CONFIG_NAME

from nara_diffusion.utils.naming import naming_source

from .llada_format import KEY_MAPPING, checkpoint_name, llama_fields
from .shifted_logits import ShiftedQwen2ForCausalLM

# Arguments of from_pretrained that say where files come from: the configuration and the tokenizer need them too.
HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)

# Kinds of checkpoint whose tokenizer class may exist in their own code only: the stock class that reads their files.
_STOCK_TOKENIZERS = {
    "llada": PreTrainedTokenizerFast,
    "illada": PreTrainedTokenizerFast,
    "dream": Qwen2Tokenizer,
}

# The class that transformers 5 names where all of a tokenizer is in tokenizer.json.
_WHOLE_IN_ITS_FILE = "TokenizersBackend"

# Heads that encoders are pre-trained with, or fine-tuned with for another task, besides the one for masked tokens.
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
        mask_token_id: which token stands for a masked one, where the checkpoint doesn't say.
        mask_token: the same by its text.
        load_in_4bit: quantise the linear layers' weights with bitsandbytes: NF4 with double quantisation, computed in
            `dtype`. For other settings pass a `quantization_config`.
        load_in_8bit: the same in 8 bits.
        **kwargs: as for `from_pretrained`: dtype, device_map, quantization_config, attn_implementation, revision,
            token, …

    Raises:
        ValueError: nothing is there, an unknown kind of checkpoint, options that the stock class can't express, tensors
            that are missing, left over or misshapen, files that are cut off, or no mask token; each by name.
    """
    name = pretrained_model_name_or_path
    hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
    with naming_source(
        Path(name, hub.get("subfolder") or ""), CONFIG_NAME, "a model of transformers"
    ):
        fields, _ = PreTrainedConfig.get_config_dict(name, **hub)
        if not fields:
            raise ValueError(f"it has no {CONFIG_NAME}")
    model_class, config, is_renamed = _class_and_config(name, fields, hub)
    tokenizer = _load_tokenizer(name, family=fields.get("model_type", ""), **hub)
    mask = _mask_token(name, tokenizer, fields, config.vocab_size, mask_token_id, mask_token)
    if is_renamed:
        kwargs["key_mapping"] = KEY_MAPPING
    if load_in_4bit or load_in_8bit:
        kwargs["quantization_config"] = _quantization(
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
        del (
            model._weight_conversions
        )  # saved under the names of its class, which is what its configuration says
    _set_special_tokens(model, tokenizer, mask)
    return model, tokenizer


def _class_and_config(
    name: str, fields: dict[str, Any], hub: dict[str, Any]
) -> tuple[Any, PreTrainedConfig, bool]:
    """(class, configuration, whether the tensors have LLaDA's names) for the config.json `fields`."""
    family = fields.get("model_type", "").lower()
    shifted = fields.get("shifted_logits", family == "dream")
    if family in ("dream", "qwen2"):
        model_class = ShiftedQwen2ForCausalLM if shifted else Qwen2ForCausalLM
        own = (
            {"shifted_logits": True} if shifted else {}
        )  # so that a saved copy is read as this class again
        return model_class, _bidirectional(Qwen2Config, fields | own), False
    if shifted:
        raise ValueError(
            f"{name} has shifted_logits, which Dream and Qwen2 have alone, and model_type {family!r}"
        )
    if family in ("llada", "illada", "llama"):
        fields = llama_fields(fields) if "d_model" in fields else fields
        return LlamaForCausalLM, _bidirectional(LlamaConfig, fields), family != "llama"
    if family in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not fields.get("is_encoder_decoder"):
        return (
            AutoModelForMaskedLM,
            AutoConfig.from_pretrained(name, trust_remote_code=False, **hub),
            False,
        )
    raise ValueError(
        f"{name} has model_type {family!r}. load_backbone knows LLaDA, iLLaDA, Dream, Llama, Qwen2 and the encoders of "
        "AutoModelForMaskedLM (BERT, RoBERTa, ModernBERT, …), and runs no code of a checkpoint"
    )


def _bidirectional(
    config_class: type[PreTrainedConfig], fields: dict[str, Any]
) -> PreTrainedConfig:
    if fields.get("use_sliding_window"):
        raise ValueError(
            "use_sliding_window=True isn't supported: attention has to see the whole sequence both ways"
        )
    foreign = ("model_type", "architectures", "auto_map", "transformers_version")
    config = config_class(**{key: value for key, value in fields.items() if key not in foreign})
    config.is_causal = False  # what transformers' masks and attention functions go by
    config.use_cache = False
    config.pad_token_id = (
        None  # nn.Embedding would give that token's row no gradient; _set_special_tokens sets it
    )
    return config


def _quantization(load_in_4bit: bool, load_in_8bit: bool, dtype: Any) -> BitsAndBytesConfig:
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            "load_in_4bit and load_in_8bit need bitsandbytes, which isn't installed: pip install "
            "'nara-diffusion[optimizers]', or '.[optimizers]' in a clone."
        )
    if not isinstance(dtype, torch.dtype):  # None and "auto" leave it to the file
        dtype = torch.bfloat16 if dtype in (None, "auto") else getattr(torch, dtype)
    return BitsAndBytesConfig(
        load_in_4bit=load_in_4bit,
        load_in_8bit=load_in_8bit,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def prepare_quantised(model: PreTrainedModel) -> None:
    """Make a model that was loaded in 4 or 8 bits ready for an adapter: all else in float32, by PEFT."""
    for module in model.modules():
        if hasattr(
            module, "support_avx512bf16_for_cpu"
        ):  # packed in evaluation, weights have no gradient in training
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def _check_tensors(name: str, loading: dict[str, Any], original: Callable[[str], str]) -> None:
    """Refuse a checkpoint whose tensors don't fit the model: what transformers only logs is an error here.

    Args:
        loading: the information of `from_pretrained(output_loading_info=True)`.
        original: the function from a tensor's name in the model to that in the checkpoint.
    """
    problems = {
        "missing": sorted(map(original, loading["missing_keys"])),
        "not known to the model": sorted(
            original(k) for k in loading["unexpected_keys"] if not _OTHER_HEADS.search(k)
        ),
        "of another shape": [
            f"{original(key)} {tuple(found)} instead of {tuple(expected)}"
            for key, found, expected in sorted(loading["mismatched_keys"])
        ],
    }
    lists = [
        f"{len(keys)} {kind}: {', '.join(keys[:8])}" for kind, keys in problems.items() if keys
    ]
    if lists:
        raise ValueError(f"the tensors of {name} don't fit its configuration; {'; '.join(lists)}")


# tokenizers, and which of their tokens is the mask


def _load_tokenizer(name: str, *, family: str, **hub: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint of the model_type `family`, without running its code and without asking on the
    terminal; `hub` are the arguments of `from_pretrained` that say where the files are.

    Raises:
        ValueError: it has none, or a damaged one.
    """
    try:
        stock: Any = _STOCK_TOKENIZERS.get(family.lower())
        if (
            stock is None
            and get_tokenizer_config(name, **hub).get("tokenizer_class") == _WHOLE_IN_ITS_FILE
        ):
            # AutoTokenizer would go by the model's type, and Qwen2's class brings rules of its own for splitting
            stock = PreTrainedTokenizerFast
        return (stock or AutoTokenizer).from_pretrained(name, trust_remote_code=False, **hub)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"The tokenizer of {name} can't be loaded: {reason} Are tokenizer.json and tokenizer_config.json there?"
        ) from error


def _mask_token(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    fields: dict[str, Any],
    vocab_size: int,
    mask_token_id: int | None,
    mask_token: str | None,
) -> int:
    """The mask token's id: as given, or else as config.json or the tokenizer has it.

    Raises:
        ValueError: nothing names one, the name isn't a token, or the id is outside the vocabulary.
    """
    if mask_token is not None:
        mask_token_id = tokenizer.get_vocab().get(mask_token)
        if mask_token_id is None:
            raise ValueError(
                f"mask_token {mask_token!r} isn't a token of {name}: name one that its vocabulary has"
            )
    candidates: tuple[Any, ...] = (
        mask_token_id,
        fields.get("mask_token_id"),
        tokenizer.mask_token_id,
    )
    known = next((int(candidate) for candidate in candidates if candidate is not None), None)
    if known is None:
        raise ValueError(
            f"neither config.json nor the tokenizer of {name} names a mask token: call "
            "load_backbone(…, mask_token='…') or load_backbone(…, mask_token_id=N) with a token that no text contains, "
            "such as a reserved one"
        )
    if not 0 <= known < vocab_size:
        raise ValueError(
            f"mask_token_id {known} is outside the vocabulary of {name}, which has {vocab_size} tokens"
        )
    return known


def _set_special_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, mask_token_id: int
) -> None:
    """Make model and tokenizer agree on mask, beginning, end and padding, which is the end token if there is no other.

    The beginning is the tokenizer's: that of Dream's configuration is its end.
    """
    config: Any = model.config
    text: Any = tokenizer.convert_ids_to_tokens
    config.mask_token_id = mask_token_id
    if tokenizer.bos_token_id is not None:
        config.bos_token_id = tokenizer.bos_token_id
    if tokenizer.mask_token_id != mask_token_id:
        tokenizer.mask_token = text(mask_token_id)
    # some configurations have no end, and others one by default that this vocabulary doesn't have
    given: Any = getattr(config, "eos_token_id", None)
    configured = (given[0] if given else None) if isinstance(given, list) else given
    candidates = (configured, tokenizer.eos_token_id, tokenizer.sep_token_id)
    end = next((i for i in candidates if i is not None and text(i) is not None), None)
    if end is None or end != configured:
        config.eos_token_id = end
    for name in ("eos_token", "pad_token"):
        if getattr(tokenizer, name) is None and end is not None:
            setattr(tokenizer, name, text(end))
    config.pad_token_id = tokenizer.pad_token_id
    tokenizer.padding_side = "right"
