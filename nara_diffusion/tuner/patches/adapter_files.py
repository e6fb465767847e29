"""Wrappers around PEFT's methods that read and write adapters. For other adapters than NaRAs they call PEFT's own.

load_adapter       PEFT keeps an adapter whose weights it refused: the wrapper removes it, and names the file
from_pretrained    the same, on a model that had no adapter before
save_pretrained    PEFT leaves half a file behind if the disk is full: the wrapper writes atomically
"""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from torch import nn

from nara_diffusion.config import NaraConfig, NaraPeftType
from nara_diffusion.tuner.injection import roll_back, trainable_again
from nara_diffusion.tuner.model import NaraModel
from nara_diffusion.utils.atomic_write import atomic_write_files
from nara_diffusion.utils.patching import around

_begun: ContextVar[tuple[nn.Module, str] | None] = ContextVar("_begun", default=None)
"""The model and the name of an adapter that `from_pretrained` adds before it calls `load_adapter`."""


def extend_peft_methods() -> None:
    """Install the wrappers below. Harmless when repeated."""
    around(PeftModel, "from_pretrained", _from_pretrained, _is_new_nara)
    around(PeftModel, "load_adapter", _load_adapter, _has_nara_tuner)
    around(PeftModel, "save_pretrained", _save_pretrained, _has_naras)


def _is_new_nara(
    cls: type,
    model: nn.Module,
    model_id: Any,
    adapter_name: str = "default",
    is_trainable: bool = False,
    config: Any = None,
    **kwargs: Any,
) -> bool:
    return isinstance(config, NaraConfig) if config is not None else is_naras_folder(model_id, kwargs)


def _has_naras(model: PeftModel, *args: Any, **kwargs: Any) -> bool:
    return any(isinstance(config, NaraConfig) for config in model.peft_config.values())


def _has_nara_tuner(model: PeftModel, *args: Any, **kwargs: Any) -> bool:
    return isinstance(model.base_model, NaraModel)


def _from_pretrained(
    original: Any, cls: type, model: nn.Module, model_id: Any, adapter_name: str = "default", *args: Any, **kwargs: Any
) -> PeftModel:
    is_new = adapter_name not in getattr(model, "peft_config", {})
    token = _begun.set((model, adapter_name) if is_new else None)
    try:
        with named(model_id, kwargs), trainable_again(model):
            return original(cls, model, model_id, adapter_name, *args, **kwargs)
    finally:
        _begun.reset(token)


def _load_adapter(original: Any, self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
    is_new = adapter_name not in self.peft_config or _begun.get() == (self.get_base_model(), adapter_name)
    try:
        with named(model_id, kwargs), trainable_again(self):
            return original(self, model_id, adapter_name, *args, **kwargs)
    except Exception:
        if is_new and isinstance(self.peft_config.get(adapter_name), NaraConfig):
            roll_back(self.get_base_model(), adapter_name)
        raise


@contextmanager
def named(model_id: Any, options: dict[str, Any]) -> Iterator[None]:
    """Inside, errors about a NaRA get the name of its folder or repository."""
    try:
        yield
    except (ValueError, KeyError, SafetensorError, UnpicklingError) as error:
        subfolder = options.get("subfolder")
        where = os.path.join(model_id, subfolder) if subfolder else os.fspath(model_id)
        if where in str(error) or not is_naras_folder(model_id, options):
            raise
        raise ValueError(_refusal(where, error)) from error


def is_naras_folder(model_id: Any, options: dict[str, Any]) -> bool:
    hub = {name: options[name] for name in ("subfolder", "revision", "cache_dir", "token") if name in options}
    try:
        return PeftConfig._get_peft_type(model_id, **hub) == NaraPeftType.NARA.value
    except Exception:  # it can't be asked: the error that is on its way says why
        return False


def _refusal(where: str, error: Exception) -> str:
    if isinstance(error, (SafetensorError, UnpicklingError)):
        return f"The weights in '{where}' are no whole file ({error}): it was cut off, so download or save it again."
    if isinstance(error, KeyError):
        return f"The checkpoint in '{where}' lacks {error}, of a module that is saved beside the adapter."
    return f"The adapter in '{where}' is refused: {error}"


def _save_pretrained(original: Any, self: PeftModel, save_directory: Any, *args: Any, **kwargs: Any) -> None:
    given = inspect.signature(original).bind(self, save_directory, *args, **kwargs).arguments
    writes = given.get("is_main_process", True) and not os.path.isfile(save_directory)
    if not writes:
        original(self, save_directory, *args, **kwargs)
        return
    folder = Path(save_directory)
    with atomic_write_files(folder) as partial:
        if (folder / "README.md").is_file():  # PEFT goes on with the card that is there
            shutil.copy(folder / "README.md", partial)
        original(self, str(partial), *args, **kwargs)
