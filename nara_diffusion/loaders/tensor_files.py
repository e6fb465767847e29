"""Find, read and write tensor files on disk or on the Hub, and recognise those of a NaRA."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffusers.utils.hub_utils import _get_model_file
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME as PEFT_CONFIG_NAME
from peft.utils import SAFETENSORS_WEIGHTS_NAME as PEFT_WEIGHTS_NAME
from peft.utils import WEIGHTS_NAME as PEFT_PICKLE_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nara_diffusion.config import NaraPeftType
from nara_diffusion.strict import check_loaded, is_core_key
from nara_diffusion.utils.repositories import is_out_of_reach
from nara_diffusion.utils.wording import listed

WEIGHTS_NAME = "pytorch_nara_weights.safetensors"
METADATA_KEY = "nara_adapter_metadata"
"""The key of the configurations in the metadata of a pipeline's file."""


# ---------------------------------------------------------------------- is it a NaRA?


def is_nara(path: Path) -> bool:
    """Return whether a file, a PEFT folder or a pipeline's adapter folder contains a NaRA adapter.

    For a file that can't be read, return False. Code that reads the file later raises the error.

    Raises:
        ValueError: a folder's adapter_config.json is damaged, or has another type but a core.
    """
    if path.is_file():
        return _has_core(path)
    config = path / PEFT_CONFIG_NAME
    if config.is_file():
        kind = adapter_type(config)
        if kind != NaraPeftType.NARA.value and "core_type" in read_config_file(config):
            raise ValueError(
                f"'{config}' has the fields of a NaRA, but peft_type is {kind!r}, not "
                f"{NaraPeftType.NARA.value!r}: download or save it again."
            )
        return kind == NaraPeftType.NARA.value
    return (path / WEIGHTS_NAME).is_file()


def is_nara_for_peft(source: str, subfolder: str | None = None, **hub: object) -> bool:
    """Return whether a folder or repository that PEFT is about to load contains a NaRA adapter."""
    folder = Path(source, subfolder or "")
    if (folder / PEFT_CONFIG_NAME).is_file():
        return is_nara(folder)
    try:
        found = PeftConfig._get_peft_type(source, subfolder=subfolder, **hub)
    except Exception:  # PEFT is about to raise its own error
        return False
    return found == NaraPeftType.NARA.value


def _has_core(path: Path) -> bool:
    """Return whether a safetensors file contains NaRA metadata or tensors of a core."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())
            metadata = file.metadata() or {}
    except (OSError, SafetensorError):
        return False
    return METADATA_KEY in metadata or any(map(is_core_key, names))


def adapter_type(path: Path) -> str:
    """Return the `peft_type` in an adapter_config.json, or raise ValueError if there is none."""
    kind = read_config_file(path).get("peft_type")
    if not isinstance(kind, str):
        raise ValueError(
            f"'{path}' has no peft_type, so it describes no adapter: download or save it again."
        )
    return kind


# ---------------------------------------------------------------------- find


def locate(
    source: str | os.PathLike[str],
    weight_name: str | None,
    subfolder: str | None,
    hub: Mapping[str, Any],
) -> Path:
    """Return the path of the safetensors file for `source`, a file, folder or repository.

    Raises:
        ValueError: there is no such file.
        OSError: the download from the Hub failed.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        return _in_folder(path / subfolder if subfolder else path, weight_name)
    is_local = isinstance(source, Path) or str(source).startswith((".", "/", "~"))
    if is_local or path.suffix == ".safetensors":
        raise ValueError(
            f"There is no file or folder '{source}': pass what save_nara_weights or PEFT wrote."
        )
    repository = str(source)
    try:
        return _download(repository, weight_name or WEIGHTS_NAME, subfolder, hub)
    except OSError as error:
        if weight_name is not None:
            raise
        try:
            _download(repository, PEFT_CONFIG_NAME, subfolder, hub)
            return _download(repository, PEFT_WEIGHTS_NAME, subfolder, hub)
        except OSError:
            raise error from None  # the error for NaRA's own file name


def _download(repository: str, name: str, subfolder: str | None, hub: Mapping[str, Any]) -> Path:
    agent = {"file_type": "nara_weights", "framework": "pytorch"}
    try:
        found = _get_model_file(
            repository, weights_name=name, subfolder=subfolder, user_agent=agent, **hub
        )
    except OSError as error:
        if not is_out_of_reach(error):
            raise
        raise OSError(
            f"There is no folder '{repository}', and the Hub can't be reached to look for a "
            "repository of that name: check the connection, or name a file or folder."
        ) from error
    return Path(found)


def _in_folder(folder: Path, weight_name: str | None) -> Path:
    """Return the file `weight_name` in a folder or, if None, NaRA's, PEFT's or the only file."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    others = [path.name for path in files if path.suffix == ".safetensors" and path.is_file()]
    if weight_name is not None:
        names = [weight_name]
    else:
        names = [WEIGHTS_NAME, PEFT_WEIGHTS_NAME]
        names += others if len(others) == 1 else []
    for name in names:
        if (folder / name).is_file():
            return folder / name
    found = "it has no safetensors file"
    if others and weight_name == PEFT_WEIGHTS_NAME:
        found = f"name a folder of PEFT, not of {listed(others)}"
    elif others:
        found = f"pass weight_name, one of {listed(others)}"
    raise ValueError(f"There is no '{weight_name or WEIGHTS_NAME}' in '{folder}': {found}.")


def check_peft_weights(source: str | os.PathLike[str], subfolder: str | None = None) -> None:
    """Raise ValueError if a local folder, which PEFT is about to read, has no file of weights."""
    folder = Path(source, subfolder or "")
    path = folder / PEFT_WEIGHTS_NAME
    if not path.exists():
        path = folder / PEFT_PICKLE_NAME
    if folder.is_dir() and not path.is_file():
        _in_folder(folder, PEFT_WEIGHTS_NAME)


# ---------------------------------------------------------------------- read and write


def read_config_file(path: Path) -> dict[str, Any]:
    """Return the fields of a JSON file such as adapter_config.json, naming the file in errors."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"'{path}' can't be read ({error}): it is damaged. Download or save it again."
        ) from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """Return the tensors and metadata of a safetensors file.

    Tensors are copied, so the file may be overwritten afterwards.

    Raises:
        ValueError: the file is truncated or has another format, such as pickle.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {key: copied(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118
            return tensors, file.metadata()
    except SafetensorError as error:
        raise ValueError(
            f"'{path}' is no whole safetensors file ({error}): download or save it again if it was "
            "cut off; other formats are not read."
        ) from None


def save_tensors(
    tensors: Mapping[str, Tensor],
    path: Path,
    metadata: Mapping[str, str] | None = None,
    save_function: Callable[..., None] | None = None,
) -> None:
    """Write a safetensors file completely or not at all, with safetensors' `save_file`.

    Raises:
        OSError: the disk is full or the file can't be written. The message names file and reason.
    """
    save = save_function or save_file
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    try:
        save(contiguous, str(path), metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:
        visible = [part for part in path.parts if not part.startswith(".partial-")]
        raise OSError(f"'{Path(*visible)}' can't be written: {error}") from error


def copied(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor that shares no memory and is aligned like a model's weights.

    The last bits of products depend on the alignment. Any object but a tensor is returned unchanged.
    """
    return tensor.detach().clone() if isinstance(tensor, Tensor) else tensor


# ---------------------------------------------------------------------- other methods, whole models


def read_peft_tensors(
    source: str | Path, subfolder: str | None = None, **hub: Any
) -> dict[str, Tensor]:
    """Return the tensors of an adapter in PEFT's format, of any method, by PEFT's keys."""
    tensors, _ = read_tensors(locate(source, PEFT_WEIGHTS_NAME, subfolder, hub))
    return tensors


def load_peft_adapter(model: Any, source: str | Path, **options: Any) -> PeftModel:
    """Call `PeftModel.from_pretrained`, and check that all tensors of the file were loaded.

    Args:
        model: the base model.
        source: a folder or repository.
        options: further options, such as `revision` and `subfolder`.

    Raises:
        ValueError: there is no adapter; the folder's weights are missing or damaged; or
            `check_loaded` raises an error.
    """
    tensors = read_peft_tensors(source, **options)
    adapted = PeftModel.from_pretrained(model, str(source), **options)
    check_loaded(adapted, "default", tensors, str(source))
    return adapted


def load_whole_model(kind: Any, folder: Path, **options: object) -> nn.Module:
    """Load a Diffusers or Transformers model with `from_pretrained`, and check what was loaded.

    Raises:
        ValueError: a tensor is missing or unexpected. The message names the tensor.
    """
    model, loading = kind.from_pretrained(str(folder), output_loading_info=True, **options)
    missing = sorted(loading["missing_keys"])
    surplus = sorted(loading["unexpected_keys"])
    problems = []
    if missing:
        problems.append(f"lacks {listed(missing, 'tensors')} of {kind.__name__}")
    if surplus:
        problems.append(f"has {listed(surplus, 'tensors')}, which {kind.__name__} doesn't have")
    if problems:
        raise ValueError(
            f"{folder} {' and '.join(problems)}. Was it written by another version, or is it of "
            "another model? Save it again."
        )
    return model
