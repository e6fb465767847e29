"""Imports of torch, PEFT and Diffusers in less processor time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lasting_imports() -> Iterator[None]:
    """Import without garbage collection, and exempt what the imports made from later collections.

    Modules last as long as the program, so collections would only look through a million objects
    in vain, and once more when the program ends. This saves 3 of the 9 seconds that importing
    `nara_diffusion.dreambooth.train` and ending takes.
    """
    is_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if is_enabled:
            gc.enable()
