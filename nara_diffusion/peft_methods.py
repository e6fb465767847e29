"""What PEFT's own reading and writing of adapters has to know of NaRA, put around it once.

from_json_file     builds a configuration far from the file's name, and drops fields that it doesn't know
"""

from __future__ import annotations

import os
from typing import Any

from peft.config import PeftConfigMixin

from .around import around
from .config_files import check_config_file


def extend_peft_methods() -> None:
    """Put the functions below around PEFT's. Harmless when repeated."""
    around(PeftConfigMixin, "from_json_file", _from_json_file)


def _from_json_file(original: Any, cls: type, path_json_file: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
    check_config_file(path_json_file)
    return original(cls, path_json_file, **kwargs)
