"""What is left in a folder of an earlier export with more LoRAs."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from nara_diffusion.utils.listing import listed


def refuse_earlier_parts(folder: Path, names: Collection[str | None], pattern: str) -> None:
    """Raises ValueError if `folder` has what is named by `pattern` and isn't in `names`, those that will be written."""
    others = sorted(path.name for path in folder.glob("*") if re.fullmatch(pattern, path.name))
    others = [name for name in others if name not in names]
    if others:
        raise ValueError(
            f"'{folder}' has {listed(others)} of an earlier export, which would stay beside the new LoRAs: delete "
            f"{'it' if len(others) == 1 else 'them'}, or name another folder."
        )
