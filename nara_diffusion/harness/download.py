"""One file from the web, whole or not at all."""

from __future__ import annotations

import shutil
import urllib.error
import urllib.request
from pathlib import Path

from nara_diffusion.whole import whole_file

TIMEOUT = 60.0  # seconds without an answer


def download(url: str, path: Path) -> None:
    """Puts what is at `url` to `path`.

    Raises:
        ValueError: it can't be reached, or not be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with (
            urllib.request.urlopen(url, timeout=TIMEOUT) as answer,
            whole_file(path) as partial,
            partial.open("wb") as f,
        ):
            shutil.copyfileobj(answer, f)
    except (urllib.error.URLError, TimeoutError, OSError) as error:
        raise ValueError(f"{url} can't be fetched ({error}): fetch it by other means, and put it at {path}") from error
