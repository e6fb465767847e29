"""Encode records as rows of token ids: a prompt, an answer and its end.

If the tokenizer has a chat template, the prompt ends with the text that opens the assistant's turn.
The answer is this turn, closed as the template closes it. Attention is bidirectional, so a later
turn would reveal an earlier answer. A conversation is therefore split into pairs (all earlier
turns, next answer), and each row ends with its answer. A text without a prompt begins with BOS, if
the tokenizer has a BOS token. One end-of-sequence token ends an answer. The collator adds more of
them, which are also trained on: this is how LLaDA learns where to stop (arXiv 2502.09992,
appendix B.1).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from nara_diffusion.utils.wording import counted

from .records import BATCH, column_batches, mapped
from .tokenizer import (
    chat_text,
    encode_prompts,
    end_token_id,
    mask_in_a_text,
    prompt_text,
    token_ids,
    user_turn,
)

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

_NUMBERS = ("prompt_length", "record", "length")
_COLUMNS = ("input_ids", "instruction", "answer", *_NUMBERS)


@dataclass(frozen=True)
class EncodedRecords:
    """The rows of some records, as `encode_records` returns them.

    Attributes:
        rows: a Dataset of `input_ids` (prompt, answer, end), `prompt_length`, `instruction`,
            `answer`, and `record`, a number that the pairs of one conversation share. Rows of
            preferences also have `rejected`, the tokens of prompt, rejected answer and end.
        longest, longest_prompt: the numbers of tokens in the longest row and the longest prompt.
        longest_prompt_in: the name of the record with the longest prompt, for messages.
    """

    rows: Dataset
    longest: int
    longest_prompt: int
    longest_prompt_in: str

    def digest(self) -> str:
        """Return the SHA-256 of all tokens and of the starts of rows, answers and records."""
        texts = text_columns(self.rows)
        digests = [hashlib.sha256() for _ in range(2 + 2 * len(texts))]
        for table in column_batches(self.rows, (*texts, "prompt_length", "record")):
            columns = [table["prompt_length"], table["record"]]
            for name in reversed(texts):
                ids = table[name].combine_chunks()
                columns = [ids.flatten(), ids.value_lengths(), *columns]
            for digest, column in zip(digests, columns, strict=True):
                digest.update(column.to_numpy().tobytes())
        return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()


def text_columns(rows: Dataset) -> list[str]:
    """Return the columns of tokens: `input_ids`, and `rejected` if the rows are preferences."""
    return [name for name in ("input_ids", "rejected") if name in rows.column_names]


def encode_records(
    records: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_prompt_length: int | None = None,
    train_on: str = "last",
    name: str = "records",
) -> EncodedRecords:
    """Tokenise the records that `read_records` returned. The rows are cached by `datasets`.

    Args:
        records: records with `instruction`, `input`, `output`, `answer`, and `turns` for
            conversations. `number`, the place of a record in its file from 0, is optional.
        max_length: the maximum number of tokens of prompt, answer and end together. Longer answers
            are cut. A record is dropped if its prompt alone fills `max_length`. Both are logged.
        max_prompt_length: the maximum number of tokens of a prompt. Records with a longer prompt
            are dropped.
        train_on: the answers of a conversation that become rows, "last" or "all".
        name: the name of the records, for the log.

    Raises:
        ValueError: no record is left; a text contains the mask token; or there is a conversation,
            but the chat template is missing, rejects it, or opens an answer and a generation prompt
            differently.
    """
    from datasets import Features, List, Value

    features = Features(
        {
            **dict.fromkeys(_NUMBERS, Value("int32")),
            **dict.fromkeys(("instruction", "answer"), Value("string")),
            **dict.fromkeys(("input_ids", *text_columns(records)), List(Value("int32"))),
        }
    )
    longest = min(max_length - 1, max_length if max_prompt_length is None else max_prompt_length)
    source = (records.info.description or "").rpartition(" (fields ")[0]
    encoder = RecordEncoder(tokenizer, max_length, longest, train_on, source)
    key = encoder.cache_key()
    rows = mapped(records, encoder, key, features, batch_size=BATCH, desc="tokenise")
    if not len(rows):
        raise ValueError(
            f"{name}: nothing is left of {counted(len(records), 'record')}, since their prompts have "
            f"more than {longest} tokens: raise --max_length, or --max_prompt_length, "
            "if the model has as many positions, or take shorter prompts"
        )
    table: Any = rows.with_format("numpy")
    numbers = {column: table[column][:] for column in _NUMBERS}
    _warn_of_losses(name, len(records), numbers, encoder)
    prompts = numbers["prompt_length"]
    place = int(numbers["record"][prompts.argmax()])
    hardest = encoder.name_of(records[place], place)
    most = int(numbers["length"].clip(max=max_length).max())
    return EncodedRecords(rows, most, int(prompts.max()), hardest)


def _warn_of_losses(
    name: str, size: int, numbers: Mapping[str, np.ndarray], encoder: RecordEncoder
) -> None:
    """Warn of records that are dropped and of answers that are cut."""
    dropped = size - len(set(numbers["record"].tolist()))
    cut = int((numbers["length"] > encoder.max_length).sum())
    if dropped or cut:
        logger.warning(
            "%s: %d of %d records are dropped (their prompts have more than %d tokens), and %d of %s are "
            "cut to %d tokens: raise max_length if the model has more positions, or take shorter records",
            name,
            dropped,
            size,
            encoder.max_prompt_length,
            cut,
            counted(len(numbers["length"]), "row"),
            encoder.max_length,
        )


@dataclass(frozen=True)
class Pair:
    """A prompt and its answer as texts, from a record or an earlier turn of a conversation."""

    prompt: str
    closed: str  # the output and the end of its turn
    instruction: str
    answer: str


@dataclass(frozen=True)
class RecordEncoder:
    """Turn batches of records into batches of rows; the fields are those of `encode_records`."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    max_prompt_length: int
    train_on: str
    source: str

    def cache_key(self) -> list[Any]:
        """Return everything that the rows depend on, except the records."""
        tokenizer = self.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)  # none in pure Python
        vocabulary = tokenizer if backend is None else backend.to_str()
        limits = (self.max_length, self.max_prompt_length, self.train_on)
        return [vocabulary, tokenizer.chat_template, tokenizer.special_tokens_map, *limits]

    def name_of(self, record: Mapping[str, Any], place: int) -> str:
        """Return the name of a record in messages, made from its number and its file."""
        name = f"record {record.get('number', place) + 1}"
        return f"{name} of {self.source}" if self.source else name

    def __call__(
        self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]
    ) -> dict[str, list[Any]]:
        columns = self.rows(batch, indices)
        if "rejected" in batch:
            rejected = self.rows({**batch, "output": batch["rejected"]}, indices)
            columns["rejected"] = rejected["input_ids"]
            columns["length"] = list(map(max, columns["length"], rejected["length"]))
        return columns

    def rows(
        self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]
    ) -> dict[str, list[Any]]:
        """Return the rows of a batch of records, with the outputs as answers."""
        rows: list[tuple[Pair, dict[str, Any]]] = []
        for number, values in zip(indices, zip(*batch.values(), strict=True), strict=True):
            record = dict(zip(batch, values, strict=True))
            name = self.name_of(record, number)
            try:
                pairs = self.pairs(record)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            rows += [(pair, {"record": number, "name": name}) for pair in pairs]
        prompts = encode_prompts(self.tokenizer, [pair.prompt for pair, _ in rows])
        closed = [pair.closed for pair, _ in rows]
        answers = token_ids(self.tokenizer, closed, add_special_tokens=False)
        encoded = [
            self._row(pair, prompt, answer, facts["name"]) | facts
            for (pair, facts), prompt, answer in zip(rows, prompts, answers, strict=True)
        ]
        kept = [row for row in encoded if row["prompt_length"] <= self.max_prompt_length]
        return {name: [row[name] for row in kept] for name in _COLUMNS}

    def _row(self, pair: Pair, prompt: list[int], answer: list[int], name: str) -> dict[str, Any]:
        bos: Any = self.tokenizer.bos_token_id
        if not prompt and bos is not None:
            prompt = [bos]
        end = end_token_id(self.tokenizer)
        tokens = [*prompt, *answer] if answer[-1:] == [end] else [*prompt, *answer, end]
        mask: Any = self.tokenizer.mask_token_id
        if mask is not None and mask in tokens:
            raise ValueError(
                f"{name} has {self.tokenizer.mask_token!r} in its text, and so {mask_in_a_text(mask)}"
            )
        return {
            "input_ids": tokens[: self.max_length],
            "instruction": pair.instruction,
            "answer": pair.answer,
            "prompt_length": len(prompt),
            "length": len(tokens),
        }

    def pairs(self, record: Mapping[str, Any]) -> list[Pair]:
        """Return the pairs of a record. With `train_on` "all", a conversation has one for each answer."""
        instruction, output, answer = (record[key] for key in ("instruction", "output", "answer"))
        turns = record.get("turns") or []
        if not instruction:
            return [Pair("", output, instruction, answer)]
        if not turns and not self.tokenizer.chat_template:
            prompt = prompt_text(self.tokenizer, instruction, record["input"])
            return [Pair(prompt, output, instruction, answer)]
        pairs: list[Pair] = []
        question = None
        for i, turn in enumerate(turns if self.train_on == "all" else ()):
            content = turn["content"]
            if turn["role"] == "user":
                question = content
            elif turn["role"] == "assistant" and question is not None:
                pairs.append(self._in_template(turns[:i], question, content, content))
        turns = turns or [user_turn(instruction, record["input"])]
        return [*pairs, self._in_template(turns, instruction, output, answer)]

    def _in_template(
        self, turns: Sequence[Mapping[str, str]], instruction: str, output: str, answer: str
    ) -> Pair:
        """Return the pair of an output and its earlier turns, in the form of the chat template."""
        prompt = chat_text(self.tokenizer, turns)
        answered = [*turns, {"role": "assistant", "content": output}]
        conversation = chat_text(self.tokenizer, answered, add_generation_prompt=False)
        if not conversation.startswith(prompt):
            question = chat_text(self.tokenizer, turns, add_generation_prompt=False)
            opened, closed = prompt.removeprefix(question), conversation.removeprefix(question)[:60]
            raise ValueError(
                f"the tokenizer's chat template begins an answer with {opened!r} in a generation "
                f"prompt, but with {closed!r} in a turn with an answer, so the end of the turn can't "
                "be found: change the tokenizer's chat_template so that both begin in the same way"
            )
        return Pair(prompt, conversation.removeprefix(prompt), instruction, answer)
