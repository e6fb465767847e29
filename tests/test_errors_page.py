"""docs/errors.md quotes messages that the code has."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIRST_TABLE = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8").partition("\n## ")[0]
"""What this project says. Another section has other libraries' messages."""
ANY = "…"
"""Stands for a value: in the page's quotes, and in place of the expressions of an f-string."""


def quotes() -> list[str]:
    """The texts in backticks of the first column, but for single names."""
    cells = [line.split(" | ")[0] for line in FIRST_TABLE.splitlines() if line.startswith("| ")]
    texts = [text.replace("\\|", "|") for cell in cells for text in re.findall("`([^`]+)`", cell)]
    return [text for text in texts if " " in text]


def messages(path: Path) -> Iterator[str]:
    """The strings of a module, in one line each."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else ANY for part in node.values]
            yield " ".join("".join(map(str, parts)).split())
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield " ".join(node.value.split())


def quoted_in(quote: str, messages: str) -> bool:
    """Whether the quote's words between its placeholders stand in one of the messages (a line each), in their order."""
    words = [re.escape(part.strip(" '")) for part in quote.split(ANY)]
    return re.search(".*".join(words), messages) is not None


def test_every_quoted_message_is_in_the_code() -> None:
    in_code = "\n".join(text for path in (ROOT / "nara_diffusion").rglob("*.py") for text in messages(path))
    assert len(quotes()) > 20
    assert [quote for quote in quotes() if not quoted_in(quote, in_code)] == []


def test_quote_of_another_message_or_order_is_found() -> None:
    message = "Adapter '…' is merged at …, but this forward asks for …: call unmerge_adapter()."
    assert quoted_in("is merged at …, but this forward asks for …", f"Another message\n{message}")
    assert not quoted_in("is merged at …, but this forward asks for …", message.replace(", but", "\n, but"))
    assert not quoted_in("but this forward asks for … is merged at …", message)
    assert not quoted_in("is merged at …, and this forward asks for …", message)
