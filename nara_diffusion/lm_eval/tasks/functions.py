"""What the task files call: questions, the answer in a generated text, and its score.

The paper's commonsense and arithmetic sets are as LLM-Adapters (arXiv 2304.01933) distributes and
scores them: a JSON list of {instruction, output, answer}. The prompt is `instruction`, in the same
form as in training. The rules of `nara_diffusion.dllm.exact_match` find the answer in the model's
text: number (AddSub, GSM8K, MultiArith, SingleEq, SVAMP), letter (AQuA), choice (ARC-c, ARC-e,
OpenBookQA, SIQA, HellaSwag, WinoGrande, PIQA, BoolQ). `datasets` downloads the files once from
LLM-Adapters' repository; --metadata data_dir=DIR reads DIR/AddSub/test.json and so on, as in its
dataset/ folder.

For HumanEval and MBPP, pass@1 is the share of a question's answers that pass; there is one answer
unless the task file sets `repeats`. The task files are marked unsafe: without
--confirm_run_unsafe_code lm-eval refuses them before it generates anything. A program runs in
another interpreter (-I: without the user's packages and PYTHON… variables), with only PATH of our
environment, in an empty folder that is removed afterwards. On POSIX systems the limits of
`run_program` apply to it and to each process that it starts; the number of processes and of files
is not limited. When the program ends, or its time is over, its process group is killed (on Windows
only the program).

This contains accidents: endless loops, floods of memory or output, files and processes left behind.
It
is no sandbox against malice. The program runs as the user, so it can read and write all files of
the user and reach the network; read our environment with its tokens if the system shows it (Linux:
/proc); forge a pass by exiting as if its tests had passed; leave processes in another session. Run
it in a container without secrets, and read the programs before you trust a surprising score.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from nara_diffusion.dllm.exact_match import compare

SOURCE = "https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters/main/dataset"
_BLOCK = re.compile(r"```[a-zA-Z0-9+]*[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)

# The new interpreter's first steps. If the soft limit of CPU time were the hard one, the kernel
# would kill without a reason.
_START = """
import runpy, sys
try:
    import resource
except ImportError:
    resource = None
seconds, memory, size = map(int, sys.argv[1:4])
wanted = {"RLIMIT_CPU": (seconds, seconds + 1), "RLIMIT_AS": (memory,) * 2, "RLIMIT_FSIZE": (size,) * 2}
for name, pair in {**wanted, "RLIMIT_CORE": (0, 0)}.items() if resource else ():
    hard = resource.getrlimit(getattr(resource, name))[1]
    hard = float("inf") if hard == resource.RLIM_INFINITY else hard
    resource.setrlimit(getattr(resource, name), tuple(min(value, hard) for value in pair))
sys.argv = sys.argv[4:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


# ---------------------------------------------------------------- the paper's test sets


def load(name: str, data_dir: str | None = None, **_: Any) -> dict[str, Dataset]:
    """Return the test split, {"test": rows {question, answer}}, of the set in the folder `name`.

    Args:
        data_dir: see the module's docstring.
        _: other entries of --metadata, for other tasks.
    """
    records: Any = load_dataset(
        "json", data_files=f"{data_dir or SOURCE}/{name}/test.json", split="train"
    )
    return {"test": Dataset.from_list([_row(record) for record in records])}


def _row(record: Mapping[str, Any]) -> dict[str, str]:
    question, answer = record["instruction"], record["answer"]
    if record.get("input"):
        question = f"{question}\n\n{record['input']}"
    if isinstance(answer, list):
        answer = answer[-1]
    return {"question": question, "answer": str(answer).strip()}


def _score(rule: str, doc: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """Return {"acc": 1 if the rule finds the right answer in the text, else 0}."""
    _, is_right = compare(rule, results[0], doc["answer"])
    return {"acc": float(is_right)}


score_number = partial(_score, "number")
score_letter = partial(_score, "letter")
score_choice = partial(_score, "choice")


# ---------------------------------------------------------------- programs


def humaneval_programs(
    resps: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]
) -> list[list[str]]:
    """Return each question's answers as programs to test; a filter of lm-eval."""
    found = []
    for texts, doc in zip(resps, docs, strict=True):
        found.append([humaneval_program(doc, text) for text in texts])
    return found


def mbpp_programs(
    resps: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]
) -> list[list[str]]:
    """Return each answer after the set-up code of its tests; a filter for lm-eval."""
    found = []
    for texts, doc in zip(resps, docs, strict=True):
        setup = doc.get("test_setup_code") or ""
        found.append([f"{setup}\n{code_of(text, r'^(?:def|class) ')}" for text in texts])
    return found


def humaneval_program(doc: Mapping[str, Any], text: str) -> str:
    """Return the program of an answer: the prompt's header, then the answer.

    The answer is the function of that name, or the body of the header.
    """
    wanted = rf"^(?:async )?def {re.escape(doc['entry_point'])}\b"
    code = code_of(text, wanted)
    # the header itself is a function with a docstring as its body; a whole function then replaces
    # it
    is_whole = re.search(wanted, code, re.MULTILINE) is not None
    return f"{doc['prompt']}\n    pass\n\n{code}" if is_whole else f"{doc['prompt']}{code}"


def code_of(text: str, wanted: str) -> str:
    """Return the first fenced block with a line that matches `wanted`.

    Without one, it is the first block; without any block, the whole text.
    """
    blocks = _BLOCK.findall(text)
    for block in blocks:
        if re.search(wanted, block, re.MULTILINE):
            return block
    return blocks[0] if blocks else text


def humaneval_score(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, float]:
    """{"pass@1": share of the programs that pass the question's tests}."""
    return _pass_at_1(results[0], f"{doc['test']}\ncheck({doc['entry_point']})")


def mbpp_score(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, float]:
    """{"pass@1": share of the programs that pass the question's tests}."""
    return _pass_at_1(results[0], "\n".join(doc["test_list"]))


def _pass_at_1(programs: Sequence[str], tests: str) -> dict[str, float]:
    passed = [run_program(f"{program}\n\n{tests}") == "passed" for program in programs]
    return {"pass@1": sum(passed) / len(passed)}


def run_program(
    program: str, *, seconds: int = 10, memory: int = 4 * 2**30, file_size: int = 16 * 2**20
) -> str:
    """Run `program` until it ends or exceeds its limits; its output is not kept.

    Args:
        seconds: the CPU time of each process; the program is stopped after twice this wall time.
        memory: the address space of each process, in bytes.
        file_size: the size of each file that it writes, in bytes; stderr is one.

    Returns:
        "passed" if it reached its end, or made it look so; else "timed out", or the last line of
        its stderr.
    """
    with tempfile.TemporaryDirectory(prefix="nara-eval-", ignore_cleanup_errors=True) as folder:
        file, errors = Path(folder) / "program.py", Path(folder) / "stderr"
        # a program that exits early, for example by sys.exit(0), hasn't run its tests
        end = Path(folder) / secrets.token_hex(8)
        program = f"{program}\n\nopen({str(end)!r}, 'w').close()\n"
        file.write_text(program, encoding="utf-8", errors="replace")
        status = _wait(file, errors, seconds, memory, file_size)
        if status == 0 and end.exists():
            return "passed"
        if status is None or -status == getattr(signal, "SIGXCPU", None):
            return "timed out"
        lines = errors.read_text("utf-8", "replace").strip().splitlines()
        return lines[-1][:200] if lines else f"ended early, with status {status}"


def _wait(file: Path, errors: Path, seconds: int, *sizes: int) -> int | None:
    """Run `file`, and return its exit status, or None if it was stopped."""
    limits = [str(number) for number in (seconds, *sizes)]
    command = [sys.executable, "-I", "-X", "utf8", "-c", _START, *limits, str(file)]
    with errors.open("wb") as stderr:
        process = subprocess.Popen(
            command,
            cwd=file.parent,
            env={"PATH": os.environ.get("PATH", ""), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
        )
        try:
            return process.wait(2 * seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError, PermissionError):
                if hasattr(os, "killpg"):
                    os.killpg(process.pid, signal.SIGKILL)
                else:
                    process.kill()
            process.wait()
