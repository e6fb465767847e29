"""What a run writes for people: a table on the screen, a page of samples, the model card."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nara_diffusion.utils.hub_metadata import ADAPTER, front_matter

from .output_dir import write_text

STYLE = (
    "body{font-family:system-ui,sans-serif;margin:2em}table{border-collapse:collapse}"
    "td,th{border:1px solid #ccc;padding:.4em .7em;text-align:left;vertical-align:top}"
    "td{white-space:pre-wrap;font-family:ui-monospace,monospace;max-width:40em}"
    ".right{background:#e6f4ea}.wrong{background:#fce8e6}"
)


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of text, the first column flush left, the others flush right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def write_samples(
    path: Path, title: str, header: Sequence[str], rows: Sequence[Sequence[tuple[str, bool | None]]]
) -> None:
    """Write an HTML page with a table; each cell is (text, True for right, False for wrong, None for neither)."""
    names = {True: ' class="right"', False: ' class="wrong"', None: ""}
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "\n".join(
        "<tr>" + "".join(f"<td{names[right]}>{html.escape(text)}</td>" for text, right in row) + "</tr>" for row in rows
    )
    write_text(
        path,
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>{html.escape(title)}</h1>\n"
        f"<table><tr>{head}</tr>\n{body}\n</table></body></html>\n",
    )


def write_model_card(
    folder: Path,
    *,
    title: str,
    summary: str,
    base_model: str,
    tags: Sequence[str],
    sections: Mapping[str, str],
    library: str = "peft",
    relation: str = ADAPTER,
    **others: Any,
) -> None:
    """Write README.md: front matter for the Hub (see `front_matter`), title, summary, a heading for each section."""
    front = front_matter(library, tags, base_model, relation, **others)
    parts = [f"---\n{front.strip()}\n---", f"# {title}", summary]
    parts += [f"## {heading}\n\n{text}" for heading, text in sections.items()]
    write_text(folder / "README.md", "\n\n".join(part.strip() for part in parts) + "\n")
