"""Tables in pages that people write: what stands between two marks is made from the records, the rest is left alone.

<!-- table: loss text llada-tiny -->
…
<!-- end of table -->
"""

from __future__ import annotations

import re
from collections.abc import Callable

_END = "<!-- end of table -->"
_BLOCK = re.compile(rf"(?P<mark><!-- table: (?P<name>[^>]+?) -->\n).*?(?={re.escape(_END)})", re.DOTALL)


def fill(page: str, make: Callable[[str], str]) -> str:
    """`page` with `make(name)` between the marks of each table.

    Raises:
        ValueError: a mark without its end.
    """
    if page.count("<!-- table:") != page.count(_END):
        raise ValueError(f'each "<!-- table: … -->" needs a line "{_END}" of its own after it.')
    return _BLOCK.sub(lambda found: f"{found['mark']}\n{make(found['name'])}\n\n", page)
