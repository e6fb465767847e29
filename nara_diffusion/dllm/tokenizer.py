"""Turn prompts into texts and token ids, and decode answers.

With a chat template, a prompt is the template's text up to the start of the assistant's turn.
Without a chat template, a prompt has the form of Alpaca, as in LLM-Adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from torch import nn
from transformers import PreTrainedTokenizerBase

from .models.backbone import Backbone

_ALPACA = (
    "Below is an instruction that describes a task{more}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|role_end|>")


def end_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the token that ends an answer: EOS, or SEP for encoders.

    Raises:
        ValueError: the tokenizer has neither token.
    """
    for name in ("eos_token_id", "sep_token_id"):
        token: int | None = getattr(tokenizer, name)
        if token is not None:
            return token
    raise ValueError("the tokenizer has no eos_token to end answers with: set tokenizer.eos_token")


def stop_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of all tokens that end an answer, including the end of a chat turn."""
    configured = Backbone(model).configured("eos_token_id")
    ids = configured if isinstance(configured, list) else [configured]
    turn_ends = map(tokenizer.get_vocab().get, _TURN_ENDS)
    return sorted({*ids, end_token_id(tokenizer), *turn_ends} - {None})


def mask_in_a_text(mask_token_id: int) -> str:
    """Return the end of the error message for a text that contains the mask token."""
    return (
        f"holds the mask token ({mask_token_id}), and the model would take it for a masked token: "
        "write it otherwise, or leave it out"
    )


def prompt_text(
    tokenizer: PreTrainedTokenizerBase,
    instruction: str | Sequence[Mapping[str, str]],
    input: str = "",
) -> str:
    """Return the text that the model reads before it answers.

    Args:
        instruction: a question, or the turns of a conversation as {role, content}. A conversation
            needs a chat template.
        input: the second part of the question, if any.
    """
    if not isinstance(instruction, str):
        return chat_text(tokenizer, instruction)
    if tokenizer.chat_template:
        return chat_text(tokenizer, [user_turn(instruction, input)])
    more = ", paired with an input that provides further context" if input else ""
    part = f"### Input:\n{input}\n\n" if input else ""
    return _ALPACA.format(more=more, instruction=instruction, input=part)


def user_turn(instruction: str, input: str) -> dict[str, str]:
    """Return a question and its second part as a user's turn."""
    content = f"{instruction}\n\n{input}" if input else instruction
    return {"role": "user", "content": content}


def chat_text(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool = True,
) -> str:
    """Return a conversation, a list of {role, content}, as text by the chat template.

    Raises:
        ValueError: there is no chat template, or the template rejects the turns. Many templates
            reject a system message.
    """
    try:
        return str(
            tokenizer.apply_chat_template(
                [dict(turn) for turn in turns],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        )
    except TemplateError as error:
        roles = ", ".join(repr(turn["role"]) for turn in turns)
        raise ValueError(
            f"the tokenizer's chat template refuses the turns {roles} ({error}): leave out the "
            "system message, and let the turns of user and assistant alternate"
        ) from error


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of prompts, with the special tokens that open a text.

    Prompts from a chat template already contain these tokens.
    """
    if tokenizer.chat_template:
        return token_ids(tokenizer, prompts, add_special_tokens=False)
    encoded = token_ids(tokenizer, prompts, add_special_tokens=True)
    return [without_closing(tokenizer, ids) for ids in encoded]


def without_closing(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Return `ids` without the special token that closes a text."""
    closing = (tokenizer.eos_token_id, tokenizer.sep_token_id)
    return ids[:-1] if ids and ids[-1] in closing else ids


def token_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, add_special_tokens: bool
) -> list[list[int]]:
    """Return the token ids of each text."""
    if not texts:
        return []
    ids: Any = tokenizer(list(texts), add_special_tokens=add_special_tokens)["input_ids"]
    return ids


def decode_answer(
    tokenizer: PreTrainedTokenizerBase,
    answer: Sequence[int],
    ends: Sequence[int],
    *,
    strip: bool = True,
) -> str:
    """Return the text before the first end token.

    Args:
        strip: True to remove white space around the text. Use False for program code.
    """
    places = [place for place, token in enumerate(answer) if token in ends]
    tokens = answer[: places[0]] if places else answer
    text = str(tokenizer.decode(list(tokens), skip_special_tokens=True))
    return text.strip() if strip else text
