"""The forms of records, and the question and answer that a record of each form has.

    {"messages": [{"role": "user", "content": …}, …]}    a conversation; also "conversations",
                                                         "from" and "value"
    {"instruction": …, "input": …, "output": …, "answer": …}    as in Alpaca and LLM-Adapters
    {"prompt": …, "completion": …}    also "question"; "response" or "answer"
    {"text": …}    a text without a prompt
    {"prompt": …, "chosen": …, "rejected": …}    for preferences only: texts, or lists of messages,
                                                 which may begin with the prompt

A generation is compared with `answer`, or with the whole output if there is no such field. Fields
hold texts, numbers, true or false.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BLANK = "\ufeff \t"
"""The characters of a blank line: white space and the byte order mark."""
FIELDS = {
    "messages": ("messages", "conversations"),
    "instruction": ("instruction", "prompt", "question"),
    "input": ("input", "context"),
    "output": ("output", "completion", "response", "answer"),
    "answer": ("answer",),
    "text": ("text",),
}
PAIR_FIELDS = {"output": "chosen", "rejected": "rejected"}
"""The fields to read for preferences, in place of the usual ones."""
TEXTS = ("instruction", "input", "output", "answer")
# (required fields of a form, optional fields)
_FORMS = (
    (("output", "rejected"), ("instruction", "input", "answer")),
    (("messages",), ("answer",)),
    (("instruction", "output"), ("input", "answer")),
    (("text",), ()),
)
_EXPECTED = (
    "messages or conversations, or a question (instruction, prompt or question) and its answer "
    "(output, completion, response or answer), or text"
)
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
_KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", *_ROLES)
# Fractions are kept as written in the file, and NaN counts as missing.
_JSON = json.JSONDecoder(parse_float=str, parse_constant=lambda _: None)


def field_names(record: object, given: Mapping[str, str], where: str) -> dict[str, str]:
    """Return {role: field name} for the form of `record`. Names from the user replace usual ones.

    Raises:
        ValueError: the record has no known form.
    """
    present = list(record) if isinstance(record, Mapping) else []
    names_of_form = {
        role: given.get(role, next((name for name in usual if name in present), ""))
        for role, usual in {**FIELDS, "rejected": ()}.items()
    }
    for needed, optional in _FORMS:
        form = (*needed, *optional)
        if given.keys() <= set(form) and all(names_of_form[role] in present for role in needed):
            return {role: name for role, name in names_of_form.items() if name and role in form}
    fields = ", ".join(map(str, present)) or f"none, it is {repr(record)[:60]}"
    if "rejected" in given:
        raise ValueError(
            f"{where} has the fields {fields}; objective dpo needs {given['output']} and rejected, "
            "and prompt if these are texts."
        )
    if {"chosen", "rejected"} <= set(present):
        raise ValueError(
            f"{where} has the fields {fields}, a preference pair: give --objective dpo."
        )
    raise ValueError(
        f"{where} has the fields {fields}; expected {dict(given) or _EXPECTED}: name them with "
        "--messages_field NAME, or --instruction_field NAME --output_field NAME, "
        "or --text_field NAME"
    )


@dataclass(frozen=True)
class RecordReader:
    """Turn a batch that `datasets` loaded into a batch of records.

    Attributes:
        source: the name of the file or data set, for messages.
        kind: "table" if rows have the fields, "lines" if each line of text is a JSON object, or
            "list" if all lines together are one JSON list.
        names: {what: field name}.
    """

    source: str
    kind: str
    names: Mapping[str, str]

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields of the records that this reader returns."""
        if "rejected" in self.names:
            return (*TEXTS, "turns", "rejected")
        return (*TEXTS, "turns") if "messages" in self.names else TEXTS

    def __call__(
        self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]
    ) -> dict[str, list[Any]]:
        rows = [self.row(record, where) for where, record in self.numbered(batch, indices)]
        return {name: [row[name] for row in rows] for name in self.columns}

    def numbered(
        self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]
    ) -> Iterator[tuple[str, Any]]:
        """Yield (name for messages, record) for each record of a batch."""
        if self.kind == "list":
            records = enumerate(self.parsed("\n".join(batch["text"]), 1))
        elif self.kind == "lines":
            lines = zip(indices, batch["text"], strict=False)
            records = ((i, self.parsed(line, i + 1)) for i, line in lines if line.strip(BLANK))
        else:
            rows = zip(*batch.values(), strict=True)
            records = zip(
                indices, (dict(zip(batch, row, strict=True)) for row in rows), strict=False
            )
        for index, record in records:
            yield f"record {index + 1} of {self.source}", record

    def parsed(self, text: str, line: int) -> Any:
        """Return the JSON value of a text that begins at line `line`.

        Raises:
            ValueError: the text isn't JSON.
        """
        try:
            return _JSON.decode(text.lstrip("\ufeff"))
        except json.JSONDecodeError as error:
            place = f"line {line + error.lineno - 1}, column {error.colno}"
            raise ValueError(
                f"{self.source} breaks at {place}: {error.msg}. Each line has to hold one whole "
                'object, such as {"text": "…"}; a list over several lines has to start with ['
            ) from None

    def row(self, record: object, where: str) -> dict[str, Any]:
        """Return {instruction, input, output, answer} of a record, with `turns` if it has turns.

        The output of a preference pair is the chosen answer; it also has `rejected`.

        Raises:
            ValueError: the record doesn't have the form of the first record.
        """
        if not isinstance(record, Mapping):
            raise ValueError(f"{where}: expected an object, found {repr(record)[:60]}")
        if "rejected" in self.names:
            row = self._pair(record, where)
        elif "messages" in self.names:
            row = self._conversation(record, where)
        elif "text" in self.names:
            row = {"instruction": "", "input": "", "output": self.text(record, "text", where)}
        else:
            names = ("instruction", "input", "output")
            row = {part: self.text(record, part, where) for part in names}
        row["answer"] = row["output"]
        if "answer" in self.names:
            row["answer"] = self.text(record, "answer", where).strip()
        return row

    def _pair(self, record: Mapping[str, Any], where: str) -> dict[str, Any]:
        chosen, rejected = (self._answered(record, part, where) for part in PAIR_FIELDS)
        output = rejected.pop("output")
        if any(chosen[part] != prompt for part, prompt in rejected.items()):
            raise ValueError(
                f"{where}: its chosen and rejected messages differ before the last one; expected "
                "two answers to one prompt"
            )
        return chosen | {"rejected": output}

    def _answered(self, record: Mapping[str, Any], what: str, where: str) -> dict[str, Any]:
        """Return the prompt and one of the answers of a pair, as texts or as a conversation."""
        prompt, answer = (record.get(self.names.get(part, "")) for part in ("instruction", what))
        if not isinstance(prompt, list) and not isinstance(answer, list):
            texts = {part: self.text(record, part, where) for part in ("instruction", "input")}
            return {"turns": [], **texts, "output": self.text(record, what, where)}
        if not isinstance(prompt, list):
            prompt = [{"role": "user", "content": prompt}]
        if not isinstance(answer, list):
            answer = [{"role": "assistant", "content": answer}]
        if answer and _turn(answer[0], where)["role"] == "assistant":  # else the prompt is in it
            answer = [*prompt, *answer]
        return _read_conversation(answer, f"{where}, field {self.names[what]!r}")

    def _conversation(self, record: Mapping[str, Any], where: str) -> dict[str, Any]:
        name = self.names["messages"]
        if record.get(name) is None:
            missing = f"has no {name}, it has {', '.join(record)}"
            problem = f"has null as its {name}" if name in record else missing
            raise ValueError(
                f"{where} {problem}: the first record decides the form of all, so put other forms "
                "into their own files"
            )
        return _read_conversation(record[name], f"{where}, field {name!r}")

    def text(self, record: Mapping[str, Any], what: str, where: str) -> str:
        """Return the text of a field. White space is kept, as it may be indentation of code.

        Raises:
            ValueError: the field is missing, empty or not text. `input` may be missing or empty.
        """
        name = self.names.get(what)
        value = record.get(name, "") if name else ""
        if isinstance(value, float) and math.isnan(value):
            value = None  # a missing value in Parquet
        if not isinstance(value, str | int | float | None):
            raise ValueError(
                f"{where}: its {what}, field {name!r}, is {repr(value)[:60]}: "
                "expected a text or a number"
            )
        text = "" if value is None else str(value)
        if isinstance(value, bool):
            text = text.lower()
        if not text.strip() and what != "input":
            raise ValueError(
                f"{where}: its {what}, field {name!r}, is missing or empty; it has "
                f"{', '.join(record)}, and the first record decides the form"
                + (f": --{what}_field NAME gives another name" if what in FIELDS else "")
            )
        return text


def _read_conversation(messages: object, where: str) -> dict[str, Any]:
    """Return the record of a list of messages. Messages after the assistant's last are dropped.

    Raises:
        ValueError: a message isn't {role, content}, or a user's message or its answer is missing.
    """
    listed = messages if isinstance(messages, list) else [messages]
    turns = [_turn(message, where) for message in listed]
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()
    questions = [turn["content"] for turn in turns if turn["role"] == "user"]
    if not questions or not turns[-1]["content"].strip():
        raise ValueError(
            f"{where}: expected a user's message and the assistant's answer, "
            f"found {messages!r:.100}"
        )
    *earlier, answer = turns
    return {
        "turns": earlier if len(earlier) > 1 else [],  # a single user message is the instruction
        "instruction": questions[-1],
        "input": "",
        "output": answer["content"],
    }


def _turn(message: object, where: str) -> dict[str, str]:
    fields = message if isinstance(message, Mapping) else {}
    role = fields.get("role", fields.get("from"))
    content = fields.get("content", fields.get("value"))
    if not isinstance(role, str) or not isinstance(content, str):
        why = ": content has to be a text" if isinstance(role, str) else ""
        raise ValueError(
            f"{where}: expected a list of {{role, content}} or {{from, value}}, "
            f"found {message!r:.60}{why}"
        )
    if role not in _KNOWN_ROLES:
        expected = ", ".join(_KNOWN_ROLES)
        raise ValueError(f"{where}: the role {role!r} is unknown, expected one of {expected}")
    return {"role": _ROLES.get(role, role), "content": content}
