"""A hook of MkDocs: links to files that the site doesn't have, such as a script, become their path as code."""

import posixpath
import re
from typing import Any

_LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?P<target>[^)#:]+)(?P<anchor>#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Replaces the links of a page that lead out of docs/."""
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def shown(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link["target"]))
        return link[0] if path.startswith("docs/") else f"`{path}`"

    return _LINK.sub(shown, markdown)
