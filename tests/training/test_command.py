"""What a shell shows: one line for what this package refuses, a traceback for anything else."""

from dataclasses import dataclass

import pytest
import torch

from nara_diffusion.training.command import run_command
from nara_diffusion.training.memory import explaining_out_of_memory
from nara_diffusion.training.output import check_output_dir


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
