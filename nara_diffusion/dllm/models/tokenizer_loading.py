"""Load a checkpoint's tokenizer, and make model and tokenizer agree on the special tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

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
