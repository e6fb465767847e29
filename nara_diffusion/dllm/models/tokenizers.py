"""Tokenizers of masked language models, and which of their tokens is the mask."""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

# Kinds of checkpoint whose tokenizer class may exist in their own code only: the stock class that reads their files.
_STOCK_TOKENIZERS = {"llada": PreTrainedTokenizerFast, "illada": PreTrainedTokenizerFast, "dream": Qwen2Tokenizer}

# The class that transformers 5 names where all of a tokenizer is in tokenizer.json.
_WHOLE_IN_ITS_FILE = "TokenizersBackend"


def load_tokenizer(name: str, *, family: str, **hub: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint of the model_type `family`, without running its code and without asking on the
    terminal; `hub` are the arguments of `from_pretrained` that say where the files are.

    Raises:
        ValueError: it has none, or a damaged one.
    """
    try:
        stock: Any = _STOCK_TOKENIZERS.get(family.lower())
        if stock is None and get_tokenizer_config(name, **hub).get("tokenizer_class") == _WHOLE_IN_ITS_FILE:
            # AutoTokenizer would go by the model's type, and Qwen2's class brings rules of its own for splitting
            stock = PreTrainedTokenizerFast
        return (
            stock.from_pretrained(name, **hub)
            if stock
            else AutoTokenizer.from_pretrained(name, trust_remote_code=False, **hub)
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"The tokenizer of {name} can't be loaded: {reason} Are tokenizer.json and tokenizer_config.json there?"
        ) from error


def resolve_mask_token(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    fields: dict[str, Any],
    vocab_size: int,
    mask_token_id: int | None = None,
    mask_token: str | None = None,
) -> int:
    """The mask token's id: as given, or else as config.json or the tokenizer has it.

    Raises:
        ValueError: nothing names one, the name isn't a token, or the id is outside the vocabulary.
    """
    if mask_token is not None:
        mask_token_id = tokenizer.get_vocab().get(mask_token)
        if mask_token_id is None:
            raise ValueError(f"mask_token {mask_token!r} isn't a token of {name}: name one that its vocabulary has")
    candidates: tuple[Any, ...] = (mask_token_id, fields.get("mask_token_id"), tokenizer.mask_token_id)
    known = next((int(candidate) for candidate in candidates if candidate is not None), None)
    if known is None:
        raise ValueError(
            f"neither config.json nor the tokenizer of {name} names a mask token: call "
            "load_backbone(…, mask_token='…') or load_backbone(…, mask_token_id=N) with a token that no text contains, "
            "such as a reserved one"
        )
    if not 0 <= known < vocab_size:
        raise ValueError(f"mask_token_id {known} is outside the vocabulary of {name}, which has {vocab_size} tokens")
    return known


def set_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, mask_token_id: int) -> None:
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
