"""What a shell shows: one line for what this package refuses, a traceback for anything else."""

import errno
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from nara_diffusion.training.main import run_command
from nara_diffusion.training.metrics import MetricLog
from nara_diffusion.training.oom import explaining_out_of_memory
from nara_diffusion.training.output.output_dir import check_output_dir
from nara_diffusion.training.run import start_run


@dataclass
class NoArguments:
    """None"""


def command(main, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["script"])
    run_command(main, NoArguments, "about", {}, lambda given: {})


def test_what_is_refused_is_one_line(monkeypatch, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"^error: --output_dir .*/file: .*/file is a file: name a folder\.$"):
        command(lambda args: check_output_dir(str(tmp_path / "file")), monkeypatch)


@pytest.fixture
def _ctrl_c_interrupts():
    """Also where the tests run in the background of a shell, whose children ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c_interrupts")
@pytest.mark.parametrize(("number", "name", "code"), [(signal.SIGINT, "Ctrl-C", 130), (signal.SIGTERM, "SIGTERM", 143)])
def test_a_stop_while_loading_is_one_line(monkeypatch, tmp_path, small_args, caplog, number, name, code) -> None:
    caplog.set_level("INFO")

    def main(args: NoArguments) -> None:
        with start_run(small_args(), "small"):
            signal.raise_signal(number)

    with pytest.raises(SystemExit) as stop:
        command(main, monkeypatch)
    assert stop.value.code == code
    assert caplog.messages[-1] == f"stopped by {name}. There is no checkpoint to continue from."
    assert not (tmp_path / "run").exists()


def test_a_stop_at_once_names_the_last_checkpoint(monkeypatch, small_args, small_run, caplog) -> None:
    caplog.set_level("INFO")

    def second_ctrl_c(step: int, loss):
        if step == 4:
            raise KeyboardInterrupt
        return loss

    with pytest.raises(SystemExit) as stop:
        command(lambda args: small_run(small_args(), second_ctrl_c), monkeypatch)
    assert stop.value.code == 130
    last = Path(small_args().output_dir) / "checkpoint-4"
    assert caplog.messages[-1] == (
        f"stopped by Ctrl-C. The last whole checkpoint is {last}: to continue, run the same command with "
        f"--resume_from_checkpoint {last}"
    )


@pytest.mark.parametrize("with_name", [True, False])
def test_a_folder_that_becomes_read_only_is_one_line(monkeypatch, small_args, small_run, with_name: bool) -> None:
    """The log of losses is what is written first after it, without a `try` of its own."""
    write = MetricLog.write

    def refused(self: MetricLog, step: int, values: dict) -> None:
        if step == 5:
            name = (str(self.path),) if with_name else ()
            raise OSError(errno.EROFS, "Read-only file system", *name)
        write(self, step, values)

    monkeypatch.setattr(MetricLog, "write", refused)
    folder = Path(small_args().output_dir)
    what = folder / "metrics.jsonl" if with_name else f"a file, in {folder} most likely,"
    with pytest.raises(SystemExit) as stop:
        command(lambda args: small_run(small_args()), monkeypatch)
    assert str(stop.value.code) == (
        f"error: {what} could not be written (Read-only file system). The last whole checkpoint is "
        f"{folder / 'checkpoint-4'}: to continue, run the same command with --resume_from_checkpoint "
        f"{folder / 'checkpoint-4'}"
    )


def test_a_missing_file_elsewhere_keeps_its_traceback(monkeypatch, tmp_path, small_args) -> None:
    def main(args: NoArguments) -> None:
        with start_run(small_args(), "small"):
            (tmp_path / "none").read_text()

    with pytest.raises(FileNotFoundError, match="none"):
        command(main, monkeypatch)


def test_out_of_memory_is_one_line(monkeypatch) -> None:
    @explaining_out_of_memory
    def main(args: NoArguments) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(SystemExit, match="error: out of memory while training"):
        command(main, monkeypatch)


@pytest.mark.parametrize(
    ("main", "kind"), [(lambda args: torch.zeros(2).view(3), RuntimeError), (lambda args: int("x"), ValueError)]
)
def test_other_errors_keep_their_traceback(monkeypatch, main, kind) -> None:
    with pytest.raises(kind):
        command(main, monkeypatch)
