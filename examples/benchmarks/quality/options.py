"""Arguments of the train scripts from flat names: rarer ones go through `adapter_options` and the like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from nara_diffusion.training.adapters import CORE_FIELDS
from nara_diffusion.training.parser import gathered

Arguments = TypeVar("Arguments")
_ADAPTER = CORE_FIELDS - {"core_type"} | {"use_dora", "use_rslora"}


def arguments_of(cls: type[Arguments], values: Mapping[str, Any]) -> Arguments:
    """An instance of the dataclass `cls`.

    Raises:
        ValueError: a name that is no argument, or a value that it refuses.
    """
    own = {name: value for name, value in values.items() if name not in _ADAPTER}
    core = {name: value for name, value in values.items() if name in _ADAPTER}
    given = gathered(cls, own | ({"adapter_options": core} if core else {}))
    unknown = sorted(given.keys() - cls.__dataclass_fields__.keys())  # type: ignore[attr-defined]
    if unknown:
        raise ValueError(f"{', '.join(unknown)} is no argument of {cls.__name__}.")
    return cls(**given)
