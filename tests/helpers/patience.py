"""Waiting for what comes at once on an idle machine, and late on a busy one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

LAST_RESORT = 3600  # seconds: no wait that ends needs a tenth of it, however busy the machine is


def wait_until(condition: Callable[[], Any]) -> None:
    """Returns as soon as `condition` holds."""
    end = time.monotonic() + LAST_RESORT
    while not condition():
        assert time.monotonic() < end, "this never came"
        time.sleep(0.02)


def all_at_once(work: Callable[[Any], Any], items: Sequence[Any], barrier: threading.Barrier) -> list[Any]:
    """`work` of each item, in a thread each; when one fails, the others don't wait for it at `barrier`."""

    def guarded(item: Any) -> Any:
        try:
            return work(item)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(guarded, items))
