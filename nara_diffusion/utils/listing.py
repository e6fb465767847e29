"""Lists of names in messages."""

from __future__ import annotations

from collections.abc import Collection


def listed(names: Collection[str], kind: str = "") -> str:
    """The first three of `names`, quoted, and the number of the others, which are of this `kind`."""
    shown = ", ".join(f"'{name}'" for name in list(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more {kind}".rstrip()
