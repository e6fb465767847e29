"""The train scripts by their command lines: in this process, or in one of their own that a signal ends.

A child process is forked from a server that has imported the libraries, since importing them takes longer than a run.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import re
import runpy
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from torch import Tensor, uint8
from torch.optim.optimizer import register_optimizer_step_post_hook

ROOT = Path(__file__).parents[2]
LAST_RESORT = 300
"""Seconds that a process gets before it counts as hanging."""


def words(**flags: Any) -> list[str]:
    """{name: value} as a command line; lists are given word by word, dicts as NAME=VALUE."""
    line: list[str] = []
    for name, value in flags.items():
        if value == {}:
            continue
        values = value if isinstance(value, list) else [value]
        if isinstance(value, dict):
            values = [f"{key}={json.dumps(one)}" for key, one in value.items()]
        line += [f"--{name}", *(str(one).lower() if one in (None, True, False) else str(one) for one in values)]
    return line


def run(script: str, *line: str, **flags: Any) -> None:
    """Run `train_scripts/script` as a program does, with sys.argv of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *line, *words(**flags)])
        try:
            runpy.run_path(str(ROOT / "train_scripts" / script), run_name="__main__")
        finally:
            fresh_accelerate()


def printed(script: str, **flags: Any) -> str:
    """All that the script logs and prints."""
    log, root = StringIO(), logging.getLogger()
    handler, level = logging.StreamHandler(log), root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        with redirect_stdout(log), redirect_stderr(log):
            run(script, **flags)
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    return log.getvalue()


def fresh_accelerate() -> None:
    """A process has one accelerator; forget it."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def refusal(capsys: pytest.CaptureFixture[str], script: str, *line: str, **flags: Any) -> str:
    """The one line in which the script says what is wrong with its command line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(script, *line, **flags)
    assert stop.value.code not in (0, None)
    text = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
    lines = [one for one in text.splitlines() if one.strip() and not one.startswith("usage:")]
    assert len(lines) == 1, text
    return lines[0]


# ---------------------------------------------------------------- what a run has written


def tensors(folder: Path) -> dict[str, Tensor]:
    """Of the one file of weights in `folder`, beside what a checkpoint trains on from."""
    (file,) = (path for path in folder.glob("*.safetensors") if path.name != "trainable.safetensors")
    return load_file(file)


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def by_the_card(folder: Path, until: str) -> dict[str, Any]:
    """The variables that the model card's code makes; what begins with `until` isn't run."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert code is not None
    scope: dict[str, Any] = {}
    exec(code[1].partition(f"\n{until}")[0], scope)
    return scope


def assert_same_bits(one: Path, other: Path) -> None:
    """The adapters and the logs of two runs."""
    mine, theirs = tensors(one), tensors(other)
    assert mine.keys() == theirs.keys() != set()
    for name, value in mine.items():
        assert value.dtype == theirs[name].dtype
        assert value.numpy().tobytes() == theirs[name].numpy().tobytes(), name
    timeless = [[{k: v for k, v in line.items() if "second" not in k} for line in metrics(run)] for run in (one, other)]
    assert timeless[0] == timeless[1]


def check_leaves_the_base_out(checkpoint: Path, model: str | Path) -> None:
    """By bytes that occur in no other file: a row of the base's embedding, in float32 or bfloat16."""
    row = load_file(Path(model, "model.safetensors"))["model.transformer.wte.weight"][70]
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    contents = [value.view(uint8).numpy().tobytes() for value in (row, row.bfloat16())]
    assert files
    assert not [path.name for path in files for content in contents if content in path.read_bytes()]


# ---------------------------------------------------------------- runs that end early


@dataclass(frozen=True)
class Moment:
    """When a process sends itself a signal.

    Attributes:
        what: "step", after optimizer step `number`; "name", before the folder checkpoint-`number` gets its name.
    """

    what: str
    number: int
    signal: signal.Signals = signal.SIGKILL

    def arm(self) -> None:
        steps: list[int] = []

        def step(*_: Any) -> None:
            steps.append(1)
            if len(steps) == self.number:
                os.kill(os.getpid(), self.signal)

        def event(name: str, args: tuple[Any, ...]) -> None:
            if name == "os.rename" and Path(os.fsdecode(args[1])).name == f"checkpoint-{self.number}":
                os.kill(os.getpid(), self.signal)

        if self.what == "step":
            register_optimizer_step_post_hook(step)
        else:
            sys.addaudithook(event)


def forkserver() -> ForkServerContext:
    """What starts processes from a server that has imported the libraries."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.acceptance._preload"])
    return context


def _child(script: str, line: list[str], moment: Moment, log: Path) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    moment.arm()
    run(script, *line)


def ended_early(script: str, moment: Moment, log: Path, **flags: Any) -> int:
    """The exit code of a process that runs the script until `moment`; what it printed is in the file `log`."""
    process = forkserver().Process(target=_child, args=(script, words(**flags), moment, log))
    process.start()
    process.join(LAST_RESORT)
    if process.is_alive():
        process.kill()
        pytest.fail(f"{script} didn't end: {log.read_text()[-2000:]}")
    code = process.exitcode
    process.close()
    assert code is not None
    return code
