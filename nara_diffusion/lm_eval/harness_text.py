"""Convert lm-eval's requests to token ids and to arguments of `generate`.

Texts are tokenised in the same way as in training.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from nara_diffusion.dllm.decoding import Sampling
from nara_diffusion.dllm.tokenizer import chat_text, prompt_text, token_ids, without_closing

logger = logging.getLogger(__name__)

ALPACA = "alpaca"
"""lm-eval's name for the template of a tokenizer that has none."""
SETTINGS = tuple(field.name for field in fields(Sampling))

# lm-eval's names; the first one counts
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_DEFAULT_LENGTH = 256
# set by task files, and ignored by greedy sampling
_OF_OTHERS = ("top_k", "min_p", "num_beams", "repetition_penalty")


def read_gen_kwargs(gen_kwargs: Mapping[str, Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return the texts that end a request's answer, and the arguments for `generate`.

    `gen_length` is 256 unless it is given by this name or by one of lm-eval's names for it. As in
    lm-eval's own models, `temperature` is used unless do_sample is false. The other settings are
    those of `generate`.

    Raises:
        ValueError: the masked-diffusion sampler doesn't have a setting, or a value is invalid.
    """
    settings = {name: value for name, value in gen_kwargs.items() if value is not None}
    until = settings.pop("until", [])
    lengths = [settings.pop(name) for name in _LENGTHS if name in settings]
    if settings.pop("do_sample", None) is False or not settings.get("temperature"):
        for name in (*_OF_OTHERS, "temperature"):
            settings.pop(name, None)
    unknown = sorted(settings.keys() - set(SETTINGS))
    if unknown:
        raise ValueError(
            f"gen_kwargs has {', '.join(unknown)}, but the sampler's settings are {', '.join(SETTINGS)}."
        )
    sampling = {"gen_length": lengths[0] if lengths else _DEFAULT_LENGTH, **settings}
    try:
        for name in ("gen_length", "steps", "block_length"):
            if name in sampling:
                sampling[name] = int(sampling[name])
        Sampling(**sampling)  # raises errors before the first answer is generated
    except (TypeError, ValueError) as error:
        raise ValueError(f"gen_kwargs: {error}") from None
    return (until,) if isinstance(until, str) else tuple(until), sampling


def templated(
    tokenizer: PreTrainedTokenizerBase,
    history: Sequence[dict[str, str]],
    *,
    add_generation_prompt: bool = True,
) -> str:
    """Return a conversation as the text that the model continues.

    The text comes from the tokenizer's chat template. If there is no template, each user turn has
    Alpaca's form and follows the system message. `nara_diffusion.dllm.encode_records` does the
    same.

    Args:
        history: the messages, as dicts with role and content.
        add_generation_prompt: False if the last message is the beginning of the assistant's answer.

    Raises:
        ValueError: the chat template rejects the conversation.
    """
    if not add_generation_prompt:
        return templated(tokenizer, history[:-1]) + history[-1]["content"]
    if tokenizer.chat_template:
        return chat_text(tokenizer, history)
    text = ""
    for turn in history:
        is_question = turn["role"] == "user"
        text += prompt_text(tokenizer, turn["content"]) if is_question else f"{turn['content']}\n\n"
    return text


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, has_template: bool) -> list[int]:
    """Return a prompt's token ids, with opening but without closing special tokens.

    A text that comes from a chat template or begins with the BOS token already has its special
    tokens, so none are added.
    """
    is_open = tokenizer.bos_token is not None and text.startswith(str(tokenizer.bos_token))
    if is_open or (has_template and tokenizer.chat_template):
        return token_ids(tokenizer, [text], add_special_tokens=False)[0]
    ids = token_ids(tokenizer, [text], add_special_tokens=True)[0]
    return ids if text.endswith(str(tokenizer.eos_token)) else without_closing(tokenizer, ids)


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, context: str, continuation: str, *, has_template: bool
) -> tuple[list[int], list[int]]:
    """Return the token ids of a prompt and of its answer.

    With a template, the answer is encoded separately, as in training. Without a template, the two
    lists together are the ids of the whole text. Spaces at the end of the context then go to the
    continuation, because most vocabularies join a space to the next word.

    Raises:
        ValueError: the continuation has no token of its own.
    """
    stripped = context.rstrip()
    if has_template:
        prompt = encode(tokenizer, context, has_template=True)
        answer = token_ids(tokenizer, [continuation], add_special_tokens=False)[0]
    else:
        ids = encode(tokenizer, context + continuation, has_template=False)
        if stripped:
            length = len(encode(tokenizer, stripped, has_template=False))
        else:
            opening = (tokenizer.bos_token_id, tokenizer.cls_token_id)
            length = len(list(takewhile(opening.__contains__, ids)))
        prompt, answer = ids[:length], ids[length:]
    if not answer:
        raise ValueError(
            f"The continuation {continuation!r} adds no token to the context that ends with {context[-40:]!r}, so "
            "it has no likelihood. Leave that question out of the task."
        )
    return prompt, answer


def truncated_prompts(
    prompts: Sequence[list[int]], rooms: Sequence[int], max_length: int
) -> list[list[int]]:
    """Return the last tokens of each prompt, as many as there is room for."""
    pairs = list(zip(prompts, rooms, strict=True))
    longer = sum(len(prompt) > room for prompt, room in pairs)
    if longer:
        logger.warning(
            "%d of %d prompts lose their start, since with the answer they exceed %d tokens.",
            longer,
            len(prompts),
            max_length,
        )
    return [prompt[max(len(prompt) - room, 0) :] for prompt, room in pairs]


def up_to_stop(text: str, until: Sequence[str]) -> str:
    """Return `text` up to the first occurrence of any text in `until`."""
    ends = [text.find(stop) for stop in until if stop and stop in text]
    return text[: min(ends, default=len(text))]
