"""The last message of a run that has to stop: what stopped it, and which checkpoint is kept."""

from __future__ import annotations

import errno
from pathlib import Path

from nara_diffusion.training.checkpoints.folders import last_checkpoint

_CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}


def explain_ending(error: BaseException, folder: Path) -> BaseException | None:
    """An error of the class of `error` whose message says which checkpoint is kept; None for other kinds of errors.

    Args:
        folder: that of the run.
    """
    if isinstance(error, KeyboardInterrupt):
        return type(error)(last_checkpoint(folder))
    if isinstance(error, OSError) and _is_write_failure(error, folder):
        what = error.filename or f"a file, in {folder} most likely,"
        return OSError(f"{what} could not be written ({error.strerror}). {last_checkpoint(folder)}")
    return None


def _is_write_failure(error: OSError, folder: Path) -> bool:
    """Whether `error` is a failure to write, and not a missing file to read or an error that is explained already."""
    if error.errno in _CANNOT_WRITE:
        return True
    return isinstance(error.filename, str) and folder.absolute() in Path(error.filename).absolute().parents
