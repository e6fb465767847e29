"""Requests of lm-eval: their texts as token ids, as in training, and their gen_kwargs as arguments of `generate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from transformers import PreTrainedTokenizerBase

from nara_diffusion.dllm.decoding import Sampling
from nara_diffusion.dllm.tokenizer import chat_text, prompt_text

ALPACA = "alpaca"  # lm-eval's name for the template of a tokenizer that has none
SETTINGS = tuple(field.name for field in fields(Sampling))
_LENGTHS = (
    "max_gen_toks",
    "max_new_tokens",
    "max_tokens",
    "max_completion_tokens",
)  # lm-eval's names, first wins
_DEFAULT_LENGTH = 256
_OF_OTHERS = (
    "top_k",
    "min_p",
    "num_beams",
    "repetition_penalty",
)  # which task files set, and greedy ignores
_QUESTION = "QUESTION"  # any text that no template has after the user's


def read_gen_kwargs(gen_kwargs: Mapping[str, Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """(texts that end an answer, arguments of `generate`) of a request.

    `gen_length` is 256 unless it or one of lm-eval's names for it is given; `temperature` counts unless do_sample is
    false, as in lm-eval's own models; the other settings are `generate`'s.

    Raises:
        ValueError: a setting that the masked-diffusion sampler doesn't have, or a value that it refuses.
    """
    given = {name: value for name, value in gen_kwargs.items() if value is not None}
    until = given.pop("until", [])
    lengths = [given.pop(name) for name in _LENGTHS if name in given]
    if given.pop("do_sample", None) is False or not given.get("temperature"):
        given = {
            name: value for name, value in given.items() if name not in (*_OF_OTHERS, "temperature")
        }
    unknown = sorted(given.keys() - set(SETTINGS))
    if unknown:
        raise ValueError(
            f"gen_kwargs has {', '.join(unknown)}; the sampler's settings are {', '.join(SETTINGS)}"
        )
    sampling: dict[str, Any] = {"gen_length": (lengths or [_DEFAULT_LENGTH])[0], **given}
    try:
        sampling |= {
            n: int(sampling[n]) for n in ("gen_length", "steps", "block_length") if n in sampling
        }
        Sampling(**sampling)  # raises the errors of `generate` before the first answer is generated
    except (TypeError, ValueError) as error:
        raise ValueError(f"gen_kwargs: {error}") from None
    return (until,) if isinstance(until, str) else tuple(until), sampling


def templated(
    tokenizer: PreTrainedTokenizerBase,
    history: Sequence[dict[str, str]],
    *,
    add_generation_prompt: bool = True,
) -> str:
    """A conversation as the text that the model continues.

    By the tokenizer's chat template; without one, each of the user's turns has Alpaca's form, after the system message.
    Both are as in `nara_diffusion.dllm.encode_records`.

    Args:
        history: messages {role, content}.
        add_generation_prompt: False if the last message is the beginning of the assistant's answer.

    Raises:
        ValueError: the chat template refuses the conversation.
    """
    if not add_generation_prompt:
        return templated(tokenizer, history[:-1]) + history[-1]["content"]
    if tokenizer.chat_template:
        return chat_text(tokenizer, history)
    turns = {
        "user": lambda text: prompt_text(tokenizer, text),
        "assistant": lambda text: f"{text}\n\n",
    }
    return "".join(turns.get(turn["role"], "{}\n\n".format)(turn["content"]) for turn in history)


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, has_template: bool) -> list[int]:
    """Token ids of a prompt, with the tokenizer's opening special tokens and without its closing ones.

    A text of a chat template, or one that begins with the BOS token, has its special tokens already; none are added.
    """
    opened = tokenizer.bos_token is not None and text.startswith(str(tokenizer.bos_token))
    if opened or (has_template and tokenizer.chat_template):
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = tokenizer(text)["input_ids"]
    closing = (tokenizer.eos_token_id, tokenizer.sep_token_id)
    return (
        ids[:-1]
        if ids and ids[-1] in closing and not text.endswith(str(tokenizer.eos_token))
        else ids
    )


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, context: str, continuation: str, *, has_template: bool
) -> tuple[list[int], list[int]]:
    """(prompt, answer) token ids.

    Under a template, the prompt ends with the template, and the answer is encoded apart, as in training. Without one,
    both together are the ids of the whole text. Spaces at the end of the context, or of what it has of the answer,
    count as part of the continuation, as in most vocabularies.

    Raises:
        ValueError: the continuation has no token of its own.
    """
    prompt, context = _divided(tokenizer, context) if has_template else ("", context)
    head = encode(tokenizer, prompt, has_template=True) if prompt else []
    stripped = context.rstrip()
    continuation, context = context[len(stripped) :] + continuation, stripped

    def ids(text: str) -> list[int]:
        if prompt:
            return tokenizer(text, add_special_tokens=False)["input_ids"]
        return encode(tokenizer, text, has_template=has_template)

    whole = ids(context + continuation)
    opening = (tokenizer.bos_token_id, tokenizer.cls_token_id)
    before = next((i for i, token in enumerate(whole) if token not in opening), len(whole))
    length = len(ids(context)) if context or prompt else before
    if length >= len(whole):
        raise ValueError(
            f"the continuation {continuation!r} adds no token to the context that ends {(prompt + context)[-40:]!r}, "
            "so it has no likelihood: leave that question out of the task"
        )
    return head + whole[:length], whole[length:]


def _divided(tokenizer: PreTrainedTokenizerBase, context: str) -> tuple[str, str]:
    """The prompt as `templated` makes it, and the beginning of the answer after it (lm-eval's gen_prefix)."""
    opening = prompt_text(tokenizer, _QUESTION).rpartition(_QUESTION)[
        2
    ]  # what follows the user's text
    before, found, begun = context.rpartition(opening) if opening else ("", "", "")
    return (before + opening, begun) if found else (context, "")


def cut(text: str, until: Sequence[str]) -> str:
    """`text` up to the first occurrence of any text in `until`."""
    places = [text.find(stop) for stop in until if stop]
    return text[: min((place for place in places if place >= 0), default=len(text))]
