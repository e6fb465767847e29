"""HumanEval and MBPP: the question, the program in an answer, and pass@1 by running it.

The task files are marked unsafe: without --confirm_run_unsafe_code lm-eval refuses them, before anything is generated.
Each program runs in a process of its own with limits. That is no sandbox: `execution` lists what a program can still
do, such as forge a pass.

pass@1 of a question is the share of its answers that pass; there is one answer unless the task file sets `repeats`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .execution import run_program

_BLOCK = re.compile(r"```[a-zA-Z0-9+]*[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


def humaneval_programs(resps: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """lm-eval's filter: each question's answers as programs to test."""
    return [[humaneval_program(doc, text) for text in texts] for texts, doc in zip(resps, docs, strict=True)]


def mbpp_programs(resps: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """lm-eval's filter: the set-up code of the tests, then the answer, for each answer."""
    return [
        [f"{doc.get('test_setup_code') or ''}\n{code_of(text, r'^(?:def|class) ')}" for text in texts]
        for texts, doc in zip(resps, docs, strict=True)
    ]


def humaneval_program(doc: Mapping[str, Any], text: str) -> str:
    """The program of an answer: the prompt's header, then the answer's function of that name, or the answer as body."""
    wanted = rf"^(?:async )?def {re.escape(doc['entry_point'])}\b"
    code = code_of(text, wanted)
    # the header alone is a function whose body is its docstring; a whole function after it takes its place
    is_whole = re.search(wanted, code, re.MULTILINE) is not None
    return f"{doc['prompt']}\n    pass\n\n{code}" if is_whole else f"{doc['prompt']}{code}"


def code_of(text: str, wanted: str) -> str:
    """The first fenced block with a line that matches `wanted`, or else the first block, or else the whole text."""
    blocks = _BLOCK.findall(text)
    fitting = [block for block in blocks if re.search(wanted, block, re.MULTILINE)]
    return (fitting or blocks or [text])[0]


def humaneval_score(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, float]:
    """{"pass@1": share of the programs that pass the question's tests}."""
    return _pass_at_1(results[0], f"{doc['test']}\ncheck({doc['entry_point']})")


def mbpp_score(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, float]:
    """{"pass@1": share of the programs that pass the question's tests}."""
    return _pass_at_1(results[0], "\n".join(doc["test_list"]))


def _pass_at_1(programs: Sequence[str], tests: str) -> dict[str, float]:
    passed = [run_program(f"{program}\n\n{tests}") == "passed" for program in programs]
    return {"pass@1": sum(passed) / len(passed)}
