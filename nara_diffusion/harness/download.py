"""Download of a file, which is written whole or not at all."""

from __future__ import annotations

import os
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from uuid import uuid4

TIMEOUT = 60.0  # seconds without an answer


def download(url: str, path: Path) -> None:
    """Download `url` to `path`, and create its folder. Several processes may do so at once; one success is enough.

    Raises:
        ValueError: the file can't be reached or written, and no other process has written it meanwhile.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{uuid4().hex}-{path.name}")  # each process has its own
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer, partial.open("wb") as f:
            shutil.copyfileobj(answer, f)
        os.replace(partial, path)
    except (urllib.error.URLError, TimeoutError, OSError) as error:
        if not path.is_file():
            raise ValueError(
                f"{url} can't be fetched ({error}): fetch it by other means, and put it at {path}"
            ) from error
    finally:
        partial.unlink(missing_ok=True)
