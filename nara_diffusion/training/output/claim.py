"""A lock on the folder of a run: only one run at a time writes to it.

The claim is a lock on a file in the folder, which the operating system lifts when the process ends, however it ends: a
file that a killed run leaves behind locks nobody out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from .output_dir import CLAIM, check_output_dir, create_output_dir


class FolderClaim:
    """A lock on `folder`, until `release` or the end of the process.

    Raises:
        ValueError: another run has it.
    """

    def __init__(self, folder: Path, made: Sequence[Path] = ()):
        """`made`: folders that were made for the claim, the innermost first; those that stay empty go with it."""
        self.folder = folder
        self._made = made
        self._lock = FileLock(folder / CLAIM)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"--output_dir {folder} is in use by another run, which hasn't ended: wait for it, stop it, or name "
                "another folder."
            ) from None

    def release(self) -> None:
        """Release the folder. Harmless when repeated."""
        if not self._lock.is_locked:
            return
        (self.folder / CLAIM).unlink(missing_ok=True)
        self._lock.release()
        for folder in self._made:
            if any(folder.iterdir()):
                break
            folder.rmdir()


def claim_output_dir(
    output_dir: str | None, name: str, resume_from_checkpoint: str | None = None, root: str | Path = "outputs"
) -> FolderClaim:
    """Create the run's folder (see `create_output_dir`) and lock it.

    Raises:
        ValueError: another run has it, or has left something in it (see `check_output_dir`).
    """
    top = Path(output_dir or root)
    made = [folder for folder in (top, *top.parents) if not folder.exists()]
    folder = create_output_dir(output_dir, name, root)
    claim = FolderClaim(folder, made if output_dir is not None else [folder, *made])
    try:
        check_output_dir(output_dir, resume_from_checkpoint)  # again: nobody else writes now
    except ValueError:
        claim.release()
        raise
    return claim


def claim_together(
    accelerator: Accelerator, output_dir: str | None, name: str, resume_from_checkpoint: str | None
) -> tuple[Path, FolderClaim | None]:
    """The run's folder on all processes, and its lock on the main one, which picks the number. All continue, or none.

    Raises:
        ValueError: see `claim_output_dir`.
    """
    claim, answer = None, [Path(), ""]
    if accelerator.is_main_process:
        try:
            claim = claim_output_dir(output_dir, name, resume_from_checkpoint)
            answer = [claim.folder, ""]
        except ValueError as error:
            answer = [Path(), str(error)]
    folder, refusal = broadcast_object_list(answer)
    if refusal:
        raise ValueError(refusal)
    return folder, claim
