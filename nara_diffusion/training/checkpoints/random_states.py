"""Check of the random states in a checkpoint: accelerate silently skips those that it can't load."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import load


def check_random_states(checkpoint: Path, process: int) -> None:
    """Compare the state of every generator with the one that `engine.state.load_state` should have restored.

    Args:
        process: index of this process, which has a file of its own.

    Raises:
        ValueError: the file can't be read, or holds other states than the generators have now.
    """
    file = checkpoint / f"random_states_{process}.pkl"
    try:
        saved = load(file)
        wrong = [name for name, now in _states().items() if not _equal(saved[name], now)]
    except Exception as error:  # whatever unpickling raises
        raise _unusable(file, f"{type(error).__name__}: {error}") from error
    if wrong:
        raise _unusable(file, f"{', '.join(wrong)} can't be restored here, on other devices say")


def _states() -> dict[str, Any]:
    """State of each generator that a run uses, by accelerate's names."""
    states = {
        "random_state": random.getstate(),
        "numpy_random_seed": np.random.get_state(),  # noqa: NPY002  (what accelerate saves)
        "torch_manual_seed": torch.get_rng_state(),
    }
    return states | ({"torch_cuda_manual_seed": torch.cuda.get_rng_state_all()} if torch.cuda.is_available() else {})


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(np.array_equal(one, other))


def _unusable(file: Path, why: str) -> ValueError:
    return ValueError(
        f"{file} doesn't give the random states back ({' '.join(why.split())}), and dropout would be another one than "
        "in an uninterrupted run. Resume from another checkpoint."
    )
