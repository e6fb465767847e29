"""Encoding of records as token ids: prompt, answer, end of sequence.

With a chat template in the tokenizer, the prompt is the user's turn and what opens the assistant's, and the answer
is the assistant's turn as the template closes it. Without one, the prompt is Alpaca's, which LLM-Adapters uses too.
The answer ends with one end-of-sequence token, and the `collator` lengthens rows by more of them, which are trained
on: that is how LLaDA learns where to stop (arXiv 2502.09992, appendix B.1).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .fitting import Fit
from .prompts import check_without_mask
from .vocabulary import check_vocabulary

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)

_BATCH = 1000  # records tokenised at once
_SAMPLE = 1000  # records looked at before more are tokenised


@dataclass(frozen=True)
class EncodedRecords:
    """Attributes:
    rows: Dataset of `input_ids` (prompt, answer, end), `prompt_length`, `instruction` and `answer`.
    fit: how the records fit into `max_length`.
    """

    rows: Dataset
    fit: Fit

    @property
    def total(self) -> int:
        """The number of records before encoding."""
        return len(self.fit.lengths)

    @property
    def truncated(self) -> int:
        """The number of records whose answer was cut at `max_length`; these have no end token."""
        return self.fit.truncated

    @property
    def dropped(self) -> int:
        """The number of records that were left out, since their prompt fills `max_length`."""
        return self.fit.dropped

    def summary(self) -> str:
        """One line for a log."""
        return self.fit.summary()


def encode_records(
    records: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int, progress: bool = True
) -> EncodedRecords:
    """Tokenise what `records_from_file` or `records_from_hub` returned.

    Of many records, a sample is tokenised first, so that what is refused is refused at once.

    Args:
        records: with `instruction`, `input`, `output`, `answer`.
        max_length: tokens of prompt, answer and end together. A longer answer is cut, a prompt that fills
            `max_length` by itself drops its record; both are counted and logged.
        progress: show a bar.

    Raises:
        ValueError: there are no records, none is left, or none of the sample; the tokenizer knows less than half of
            the tokens (`check_vocabulary`); a text holds the mask token; the chat template begins an answer otherwise
            in a conversation than as a generation prompt.
    """
    from datasets import Dataset

    total = len(records)
    if total == 0:
        raise ValueError("there are no records to encode")
    sample: list[Any] = [records[i] for i in range(0, total, -(-total // _SAMPLE))]  # spread evenly
    is_part = len(sample) < total
    check_vocabulary(sample, tokenizer, total=total if is_part else None)
    _warn_of_ends_inside(records["output"][:], tokenizer)
    if is_part:
        _, fit = _encode(sample, tokenizer, max_length, f"a sample of {len(sample)} of {total} records")
        if fit.loses:
            logger.warning("%s", fit.summary())
    rows, fit = _encode(records, tokenizer, max_length, f"{total} records", progress=progress)
    logger.log(logging.WARNING if fit.loses else logging.INFO, "%s", fit.summary())
    return EncodedRecords(Dataset.from_list(rows), fit)


def _encode(
    records: Dataset | list[Any],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    name: str,
    *,
    progress: bool = False,
) -> tuple[list[dict[str, Any]], Fit]:
    """The encoded rows of the records that fit, and their `Fit`. Messages call the records `name`."""
    rows: list[dict[str, Any]] = []
    lengths: list[tuple[int, int]] = []
    mask: Any = tokenizer.mask_token_id  # None where it has none
    starts = range(0, len(records), _BATCH)
    for start in tqdm(starts, desc="tokenise", unit="batch", disable=not progress or len(starts) < 2):
        batch = [records[i] for i in range(start, min(start + _BATCH, len(records)))]
        for record, prompt, answer in zip(batch, *_encode_batch(batch, tokenizer), strict=True):
            whole = prompt + answer
            check_without_mask(whole, mask, f"the record {_text_of(record)[:100]!r}")
            lengths.append((len(prompt), len(answer)))
            if len(prompt) < max_length:
                row = {field: record[field] for field in ("instruction", "answer")}
                rows.append({"input_ids": whole[:max_length], "prompt_length": len(prompt), **row})
    fit = Fit(lengths, max_length, name)
    fit.check()
    return rows, fit


def _text_of(record: Mapping[str, str]) -> str:
    return " ".join(record[name] for name in ("instruction", "input", "output") if record[name])


def _warn_of_ends_inside(outputs: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn of outputs that go on after the end token as text, which ends an answer wherever it stands."""
    end = str(tokenizer.convert_ids_to_tokens(end_token_id(tokenizer)))
    at_the_end = re.compile(rf"(\s*{re.escape(end)})+\s*$")
    inside = [output for output in outputs if end in output and end in at_the_end.sub("", output)]
    if inside:
        logger.warning(
            "%d of %d records have the end token %r inside their output: an answer ends there, and the model learns no "
            "more than that of it; take the token out, or write it otherwise. The first of them is %r",
            *(len(inside), len(outputs), end, inside[0][:100]),
        )


def prompt_text(tokenizer: PreTrainedTokenizerBase, instruction: str, input: str = "") -> str:
    """The text that the model reads before it answers: the chat template's, or Alpaca's form."""
    if tokenizer.chat_template:
        return chat_text(tokenizer, _turn(instruction, input))
    return (_ALPACA_WITH_INPUT if input else _ALPACA).format(instruction=instruction, input=input)


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of prompts. A chat template has its special tokens; else the tokenizer adds those that open a text."""
    if tokenizer.chat_template:
        return tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    closing = (tokenizer.eos_token_id, tokenizer.sep_token_id)
    encoded = tokenizer(list(prompts))["input_ids"]
    return [ids[:-1] if ids and ids[-1] in closing else ids for ids in encoded]


def _encode_batch(
    batch: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], list[list[int]]]:
    """The token ids of a batch: prompts, and answers with their end token."""
    prompts = [prompt_text(tokenizer, record["instruction"], record["input"]) for record in batch]
    answers = [_answer_text(tokenizer, record, prompt) for record, prompt in zip(batch, prompts, strict=True)]
    end = end_token_id(tokenizer)
    answer_ids = tokenizer(answers, add_special_tokens=False)["input_ids"]
    return encode_prompts(tokenizer, prompts), [ids if ids[-1:] == [end] else [*ids, end] for ids in answer_ids]


def _answer_text(tokenizer: PreTrainedTokenizerBase, record: Mapping[str, str], prompt: str) -> str:
    """The assistant's turn after its `prompt`: the output, and what the template ends the turn with."""
    if not tokenizer.chat_template:
        return record["output"]
    question = _turn(record["instruction"], record["input"])
    whole = chat_text(
        tokenizer, [*question, {"role": "assistant", "content": record["output"]}], add_generation_prompt=False
    )
    if not whole.startswith(prompt):
        asked = chat_text(tokenizer, question, add_generation_prompt=False)
        raise ValueError(
            f"the tokenizer's chat template begins an answer with {prompt.removeprefix(asked)!r} as generation prompt, "
            f"and a turn with an answer otherwise, {whole.removeprefix(asked)[:60]!r}: the end of the turn can't be "
            "told; change the tokenizer's chat_template to begin both alike"
        )
    return whole.removeprefix(prompt)


def _turn(instruction: str, input: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{instruction}\n\n{input}" if input else instruction}]


def chat_text(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
) -> str:
    """A conversation, {role, content} a turn, as the tokenizer's chat template writes it.

    Raises:
        ValueError: the template refuses the conversation, as many do a system message.
    """
    try:
        text: Any = tokenizer.apply_chat_template(
            [dict(turn) for turn in turns], tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        roles = [turn["role"] for turn in turns]
        alternate = "let turns of user and assistant alternate, the user's first"
        advice = "leave out the system message" if "system" in roles else alternate
        raise ValueError(
            f"the tokenizer's chat template refuses the turns {', '.join(map(repr, roles))} ({error}): {advice}"
        ) from error
    return text


def end_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an answer: eos, or sep for encoders.

    Raises:
        ValueError: the tokenizer has neither.
    """
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if end is None:
        raise ValueError("the tokenizer has no eos_token to end answers with: set tokenizer.eos_token")
    return int(end)  # type: ignore[arg-type]
