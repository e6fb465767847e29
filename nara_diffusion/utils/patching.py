"""A function put around another library's, once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any


def around(owner: Any, name: str, function: Callable[..., Any]) -> None:
    """Let `owner.name(…)` be `function(original, …)`, a class method's class included. Harmless when repeated."""
    found = inspect.getattr_static(owner, name)
    of_class = isinstance(found, classmethod)
    original = found.__func__ if of_class else found
    if getattr(original, "knows_cores", False):
        return

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(original, *args, **kwargs)

    wrapper.knows_cores = True  # type: ignore[attr-defined]
    setattr(owner, name, classmethod(wrapper) if of_class else wrapper)
