"""Encoding of records as token ids: prompt, answer, end of sequence.

With a chat template in the tokenizer, the prompt is the turns before an answer and what opens the assistant's, and the
answer is the assistant's turn as the template closes it. Attention is bidirectional, so that a later turn would show an
earlier answer: a conversation is the pairs (everything before, next answer), each of which ends with its answer.
Without a chat template, the prompt is Alpaca's, which LLM-Adapters uses too. A text that no prompt stands before begins
with BOS, if the tokenizer has one. The answer ends with one end-of-sequence token, and the collator lengthens rows by
more of them, which are trained on: that is how LLaDA learns where to stop (arXiv 2502.09992, appendix B.1).
"""

from __future__ import annotations

import hashlib
import logging
import re
import string
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from nara_diffusion.utils.naming import counted

from .canvas import mask_in_a_text
from .records import BATCH, mapped

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

_ALPACA = (
    "Below is an instruction that describes a task{more}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
_NO_LIMIT = 2**31 - 1
_NUMBERS = ("prompt_length", "record", "pairs", "length", "ends_inside")


@dataclass(frozen=True)
class EncodedRecords:
    """Attributes:
    rows: Dataset of `input_ids` (prompt, answer, end), `prompt_length`, `instruction` and `answer`; and `record`, the
        number of the record, which the pairs of a conversation share.
    longest, longest_prompt: the tokens of the longest row, and of the longest prompt.
    longest_prompt_in: what messages call the record with the longest prompt.
    """

    rows: Dataset
    longest: int
    longest_prompt: int
    longest_prompt_in: str

    def digest(self) -> str:
        """SHA-256 of the tokens of all rows, and of where rows, answers and records begin."""
        found = [hashlib.sha256() for _ in range(4)]
        for table in self.rows.with_format("arrow").iter(BATCH):
            ids: Any = table["input_ids"].combine_chunks()  # type: ignore[index]
            columns = (ids.flatten(), ids.value_lengths(), table["prompt_length"], table["record"])  # type: ignore[index]
            for digest, column in zip(found, columns, strict=True):
                digest.update(column.to_numpy().tobytes())
        return hashlib.sha256(b"".join(digest.digest() for digest in found)).hexdigest()


def encode_records(
    records: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_prompt_length: int | None = None,
    train_on: str = "last",
    name: str = "records",
) -> EncodedRecords:
    """Tokenise what `read_records` returned; `datasets` caches the rows.

    Args:
        records: with `instruction`, `input`, `output`, `answer`, and `turns` of conversations; perhaps `number`, from
            0, in their file.
        max_length: tokens of prompt, answer and end together. A longer answer is cut, a prompt that fills
            `max_length` by itself drops its record; both are counted and logged.
        max_prompt_length: drops records with a longer prompt, too.
        train_on: the answers of a conversation that become rows, "last" or "all".
        name: what the log calls the records.

    Raises:
        ValueError: no record is left; a text holds the mask token; the chat template refuses a conversation, or begins
            an answer otherwise in one than as a generation prompt; a conversation without a chat template.
    """
    from datasets import Features, List, Value

    features = {name: Value("int32") for name in _NUMBERS} | {"input_ids": List(Value("int32"))}
    features |= {name: Value("string") for name in ("instruction", "answer")}
    vocabulary = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer  # type: ignore[attr-defined]
    longest = min(max_length - 1, max_length if max_prompt_length is None else max_prompt_length)
    key = [
        vocabulary,
        tokenizer.chat_template,
        tokenizer.special_tokens_map,
        max_length,
        longest,
        train_on,
    ]
    source = (records.info.description or "").rpartition(" (fields ")[0]
    encoder = _Encoder(tokenizer, max_length, longest, train_on, source)
    rows = mapped(records, encoder, key, Features(features), batch_size=BATCH, desc="tokenise")
    columns: Any = rows.with_format("numpy")
    prompts, numbers, pairs, lengths, inside = (columns[name][:] for name in _NUMBERS)
    kept = dict(zip(numbers.tolist(), pairs.tolist(), strict=True))  # {record: its pairs}
    cut, dropped, partly = (
        int((lengths > max_length).sum()),
        len(records) - len(kept),
        sum(kept.values()) - len(rows),
    )
    if not len(rows):
        whole = replace(encoder, max_length=_NO_LIMIT, max_prompt_length=_NO_LIMIT)
        lengths = mapped(
            records, whole, [*key, _NO_LIMIT], Features(features), batch_size=BATCH, desc="tokenise"
        )
        shortest = min(lengths["prompt_length"])
        flags = [f"--max_length {shortest + 1} or more"] * (max_length <= shortest)
        flags += [f"--data_options max_prompt_length={shortest} or more"] * (
            (max_prompt_length or shortest) < shortest
        )
        raise ValueError(
            f"{name}: nothing is left of {counted(len(records), 'record')}. The shortest prompt has {shortest} tokens, "
            f"and {longest} are allowed: give {' and '.join(flags)}, if the model has as many positions, or take "
            "shorter prompts"
        )
    most = sorted(lengths)[int(0.9 * (len(rows) - 1))]
    summary = f"90 % of its {counted(len(rows), 'row')} have {most} tokens or fewer, and max_length is {max_length}"
    why = f"whose prompts have more than {longest} tokens"
    losses = [f"{dropped} of {len(records)} records are dropped, {why}"] * bool(dropped)
    losses += [
        f"left out likewise: {counted(partly, 'late answer')} of other conversations"
    ] * bool(partly)
    losses += [f"{cut} of {counted(len(rows), 'row')} are cut"] * bool(cut)
    if losses:
        remedy = "raise it if the model has more positions, or take shorter records"
        logger.warning("%s: %s; %s: %s", name, ", and ".join(losses), summary, remedy)
    else:
        logger.info("%s: %s", name, summary)
    if inside.any():
        logger.warning(
            "%s: %d of %d outputs have the end token %r inside them: an answer ends there, and the model learns no "
            "more than that of it; take the token out, or write it otherwise. The first of them answers %r",
            *(
                name,
                inside.sum(),
                len(rows),
                encoder.end_text,
                rows[int(inside.argmax())]["instruction"][:100],
            ),
        )
    place = int(numbers[prompts.argmax()])
    hardest = encoder.name_of(records[place], place)
    return EncodedRecords(
        rows, int(lengths.clip(max=max_length).max()), int(prompts.max()), hardest
    )


@dataclass(frozen=True)
class _Encoder:
    """Batches of records to batches of rows."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    max_prompt_length: int
    train_on: str
    source: str

    def name_of(self, record: Mapping[str, Any], place: int) -> str:
        """What messages call a record: its number, and its file."""
        return f"record {record.get('number', place) + 1}" + (
            f" of {self.source}" if self.source else ""
        )

    @property
    def end_text(self) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(end_token_id(self.tokenizer)))

    def __call__(
        self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]
    ) -> dict[str, list[Any]]:
        tokenizer, end = self.tokenizer, end_token_id(self.tokenizer)
        mask: Any = tokenizer.mask_token_id
        inside = re.compile(rf"{re.escape(self.end_text)}(?!(\s|{re.escape(self.end_text)})*$)")
        records = (
            dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)
        )
        pairs: list[dict[str, Any]] = []
        for number, record in zip(indices, records, strict=True):
            name = self.name_of(record, number)
            try:
                found = self.pairs(record)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            pairs += [
                pair | {"record": number, "name": name, "pairs": len(found)} for pair in found
            ]
        prompts = encode_prompts(tokenizer, [pair["prompt"] for pair in pairs])
        answers = _ids(tokenizer, [pair["closed"] for pair in pairs], add_special_tokens=False)
        rows: list[dict[str, Any]] = []
        for pair, prompt, answer in zip(pairs, prompts, answers, strict=True):
            opening = prompt or [token for token in [tokenizer.bos_token_id] if token is not None]
            whole = [*opening, *answer] if answer[-1:] == [end] else [*opening, *answer, end]
            if mask in whole:
                written = f"{pair['name']} has {tokenizer.mask_token!r} in its text, and so"
                raise ValueError(f"{written} {mask_in_a_text(mask)}")
            pair |= {"length": len(whole), "ends_inside": inside.search(pair["output"]) is not None}
            if len(opening) <= self.max_prompt_length:
                rows.append(
                    pair | {"input_ids": whole[: self.max_length], "prompt_length": len(opening)}
                )
        return {
            name: [row[name] for row in rows]
            for name in ("input_ids", "instruction", "answer", *_NUMBERS)
        }

    def pairs(self, record: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The {prompt, output, closed, instruction, answer} of a record; `closed`: the output and its turn's end."""
        last = {name: record[name] for name in ("instruction", "output", "answer")}
        question, turns = (record["instruction"], record["input"]), record.get("turns") or []
        if not record["instruction"]:
            return [last | {"prompt": "", "closed": record["output"]}]
        if not self.tokenizer.chat_template and not turns:
            return [
                last
                | {"prompt": prompt_text(self.tokenizer, *question), "closed": record["output"]}
            ]
        pairs = []
        for i, turn in enumerate(turns if self.train_on == "all" else []):
            asked = [one["content"] for one in turns[:i] if one["role"] == "user"]
            if turn["role"] == "assistant" and asked:
                earlier = {
                    "instruction": asked[-1],
                    "output": turn["content"],
                    "answer": turn["content"],
                }
                pairs.append(earlier | self.in_template(turns[:i], turn["content"]))
        return [*pairs, last | self.in_template(turns or _turn(*question), record["output"])]

    def in_template(self, turns: Sequence[Mapping[str, str]], output: str) -> dict[str, str]:
        """The {prompt, closed} of an output after its turns: the assistant's turn, as the template ends it."""
        prompt = chat_text(self.tokenizer, turns)
        answered = [*turns, {"role": "assistant", "content": output}]
        whole = chat_text(self.tokenizer, answered, add_generation_prompt=False)
        if not whole.startswith(prompt):
            asked = chat_text(self.tokenizer, turns, add_generation_prompt=False)
            raise ValueError(
                f"the tokenizer's chat template begins an answer with {prompt.removeprefix(asked)!r} as generation "
                f"prompt, and a turn with an answer otherwise, {whole.removeprefix(asked)[:60]!r}: the end of the turn "
                "can't be found; change the tokenizer's chat_template to begin both alike"
            )
        return {"prompt": prompt, "closed": whole.removeprefix(prompt)}


def prompt_text(
    tokenizer: PreTrainedTokenizerBase,
    instruction: str | Sequence[Mapping[str, str]],
    input: str = "",
) -> str:
    """The text that the model reads before it answers: the chat template's, or Alpaca's form.

    Args:
        instruction: a question, or the turns of a conversation, {role, content} each, which need a chat template.
    """
    if not isinstance(instruction, str):
        return chat_text(tokenizer, instruction)
    if tokenizer.chat_template:
        return chat_text(tokenizer, _turn(instruction, input))
    more = ", paired with an input that provides further context" if input else ""
    return _ALPACA.format(
        more=more, instruction=instruction, input=f"### Input:\n{input}\n\n" if input else ""
    )


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of prompts. A chat template has its special tokens; else the tokenizer adds those that open a text."""
    if tokenizer.chat_template:
        return _ids(tokenizer, prompts, add_special_tokens=False)
    closing = (tokenizer.eos_token_id, tokenizer.sep_token_id)
    encoded = _ids(tokenizer, prompts, add_special_tokens=True)
    return [ids[:-1] if ids and ids[-1] in closing else ids for ids in encoded]


def _ids(tokenizer: Any, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
    backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None
    if (
        backend and not backend.truncation and not backend.padding
    ):  # 1.3 times as fast as the tokenizer's own call
        return [
            one.ids
            for one in backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        ]
    return (
        tokenizer(list(texts), add_special_tokens=add_special_tokens)["input_ids"] if texts else []
    )


def _turn(instruction: str, input: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{instruction}\n\n{input}" if input else instruction}]


def chat_text(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool = True,
) -> str:
    """A conversation, {role, content} a turn, as the tokenizer's chat template writes it.

    Raises:
        ValueError: there is no template, or it refuses the conversation, as many do a system message.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"the conversation {textwrap.shorten(str(turns), 100, placeholder=' …')} needs a chat template: take an "
            "instruct model, or set the tokenizer's chat_template"
        )
    try:
        text: Any = tokenizer.apply_chat_template(
            [dict(turn) for turn in turns],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except TemplateError as error:
        raise ValueError(
            f"the tokenizer's chat template refuses the turns {', '.join(repr(turn['role']) for turn in turns)} "
            f"({error}): leave out the system message, and let turns of user and assistant alternate"
        ) from error
    return text


def digit_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of the ten digits, which are equal where the tokenizer doesn't know them."""
    return [
        ids[-1] for ids in tokenizer(list(string.digits), add_special_tokens=False)["input_ids"]
    ]  # type: ignore[union-attr]


def end_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an answer: eos, or sep for encoders.

    Raises:
        ValueError: the tokenizer has neither.
    """
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if end is None:
        raise ValueError(
            "the tokenizer has no eos_token to end answers with: set tokenizer.eos_token"
        )
    return int(end)  # type: ignore[arg-type]
