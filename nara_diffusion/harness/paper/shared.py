"""Writing files in a folder that several machines share."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_shared(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all. Each writer has its own temporary file; the last one wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{secrets.token_hex(8)}-{path.name}")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
