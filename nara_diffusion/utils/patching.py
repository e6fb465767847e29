"""A function put around another library's, once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any


def around(owner: Any, name: str, function: Callable[..., Any], when: Callable[..., bool] | None = None) -> None:
    """Replace `owner.name` by a wrapper, once.

    Args:
        owner: the class or module that has the function.
        function: what the wrapper calls, as `function(original, …)` with the arguments of the call.
        when: called first, with the arguments of the call; where it is False, the wrapper calls the original function
            and nothing else. None: `function` itself looks at what the original reads from a file.
    """
    found = inspect.getattr_static(owner, name)
    of_class = isinstance(found, classmethod)
    original = found.__func__ if of_class else found
    if getattr(original, "knows_cores", False):
        return

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if when is not None and not when(*args, **kwargs):
            return original(*args, **kwargs)
        return function(original, *args, **kwargs)

    wrapper.knows_cores = True  # type: ignore[attr-defined]
    setattr(owner, name, classmethod(wrapper) if of_class else wrapper)
