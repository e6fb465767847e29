"""Names and counts in messages."""

from __future__ import annotations

from collections.abc import Collection


def listed(names: Collection[str], kind: str = "") -> str:
    """Return text with the first three `names`, quoted, and the number of others of that `kind`."""
    quoted = ", ".join(f"'{name}'" for name in list(names)[:3])
    return quoted if len(names) <= 3 else f"{quoted} and {len(names) - 3} more {kind}".rstrip()


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: "1 prompt", "4 prompts", "2 processes"."""
    if number == 1:
        return f"{number} {noun}"
    return f"{number} {noun}{'es' if noun.endswith('s') else 's'}"
