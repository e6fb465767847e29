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

from nara_diffusion.dllm.canvas import mask_in_a_text

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

_ALPACA = (
    "Below is an instruction that describes a task{more}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
_BATCH = 1000  # records tokenised at once


@dataclass(frozen=True)
class EncodedRecords:
    """Attributes:
    rows: Dataset of `input_ids` (prompt, answer, end), `prompt_length`, `instruction` and `answer`.
    total: the number of records before encoding.
    truncated: of them, those whose answer was cut at `max_length`; these have no end token.
    dropped: of them, those that were left out, since their prompt fills `max_length`.
    longest, longest_prompt: the tokens of the longest row, and of the longest prompt among the rows.
    """

    rows: Dataset
    total: int
    truncated: int
    dropped: int
    longest: int
    longest_prompt: int


def encode_records(
    records: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int, progress: bool = True
) -> EncodedRecords:
    """Tokenise what `records_from_file` or `records_from_hub` returned.

    Args:
        records: with `instruction`, `input`, `output`, `answer`.
        max_length: tokens of prompt, answer and end together. A longer answer is cut, a prompt that fills
            `max_length` by itself drops its record; both are counted and logged.
        progress: show a bar.

    Raises:
        ValueError: no record is left; a text holds the mask token; the chat template begins an answer otherwise in a
            conversation than as a generation prompt.
    """
    from datasets import Dataset

    rows: list[dict[str, Any]] = []
    lengths: list[int] = []
    end, mask = end_token_id(tokenizer), tokenizer.mask_token_id
    _warn_of_ends_inside(records["output"][:], str(tokenizer.convert_ids_to_tokens(end)))
    starts = range(0, len(records), _BATCH)
    for start in tqdm(starts, desc="tokenise", unit="batch", disable=not progress or len(starts) < 2):
        batch: list[Any] = [records[i] for i in range(start, min(start + _BATCH, len(records)))]
        prompts = [prompt_text(tokenizer, record["instruction"], record["input"]) for record in batch]
        answers = [_answer_text(tokenizer, *pair) for pair in zip(batch, prompts, strict=True)]
        answer_ids = tokenizer(answers, add_special_tokens=False)["input_ids"]
        for record, prompt, answer in zip(batch, encode_prompts(tokenizer, prompts), answer_ids, strict=True):
            whole = [*prompt, *answer] if answer[-1:] == [end] else [*prompt, *answer, end]
            if mask in whole:
                raise ValueError(f"the record {record['instruction'][:100]!r} {mask_in_a_text(mask)}")  # type: ignore[arg-type]
            lengths.append(len(whole))
            if len(prompt) < max_length:
                row = {field: record[field] for field in ("instruction", "answer")}
                rows.append({"input_ids": whole, "prompt_length": len(prompt), **row})
    cut, dropped = sum(len(row["input_ids"]) > max_length for row in rows), len(lengths) - len(rows)
    summary = f"{len(lengths)} records: {len(rows)} kept, {cut} of them cut, {dropped} dropped"
    if cut or dropped:
        most = sorted(lengths)[int(0.9 * (len(lengths) - 1))]
        summary += f"; of 10 records 9 have {most} tokens or fewer, and max_length is {max_length}"
    if not rows:
        raise ValueError(f"nothing is left to train on: the prompts alone fill max_length ({summary})")
    logger.log(logging.WARNING if cut or dropped else logging.INFO, "%s", summary)
    for row in rows:
        row["input_ids"] = row["input_ids"][:max_length]
    longest, longest_prompt = max(len(row["input_ids"]) for row in rows), max(row["prompt_length"] for row in rows)
    return EncodedRecords(Dataset.from_list(rows), len(lengths), cut, dropped, longest, longest_prompt)


def _warn_of_ends_inside(outputs: Sequence[str], end: str) -> None:
    """Warn of outputs that go on after the end token as text, which ends an answer wherever it stands."""
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
    more = ", paired with an input that provides further context" if input else ""
    return _ALPACA.format(more=more, instruction=instruction, input=f"### Input:\n{input}\n\n" if input else "")


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of prompts. A chat template has its special tokens; else the tokenizer adds those that open a text."""
    if tokenizer.chat_template:
        return tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    closing = (tokenizer.eos_token_id, tokenizer.sep_token_id)
    encoded = tokenizer(list(prompts))["input_ids"]
    return [ids[:-1] if ids and ids[-1] in closing else ids for ids in encoded]


def _answer_text(tokenizer: PreTrainedTokenizerBase, record: Mapping[str, str], prompt: str) -> str:
    """The assistant's turn after its `prompt`: the output, and what the template ends the turn with."""
    if not tokenizer.chat_template:
        return record["output"]
    question = _turn(record["instruction"], record["input"])
    turns = [*question, {"role": "assistant", "content": record["output"]}]
    whole = chat_text(tokenizer, turns, add_generation_prompt=False)
    if not whole.startswith(prompt):
        asked = chat_text(tokenizer, question, add_generation_prompt=False)
        raise ValueError(
            f"the tokenizer's chat template begins an answer with {prompt.removeprefix(asked)!r} as generation prompt, "
            f"and a turn with an answer otherwise, {whole.removeprefix(asked)[:60]!r}: the end of the turn can't be "
            "found; change the tokenizer's chat_template to begin both alike"
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
        raise ValueError(
            f"the tokenizer's chat template refuses the turns {', '.join(repr(turn['role']) for turn in turns)} "
            f"({error}): leave out the system message, and let turns of user and assistant alternate"
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
