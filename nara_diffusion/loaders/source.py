"""Reading an adapter from a path, a repository or a dictionary.

There are two formats: the file of `save_nara_weights` (see `format`); and PEFT's folder, with adapter_config.json and
adapter_model.safetensors, which `save_pretrained` and `train_scripts/dllm.py` write.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers.utils.hub_utils import _get_model_file
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import load_peft_weights
from peft.utils import CONFIG_NAME as PEFT_CONFIG_NAME
from peft.utils import SAFETENSORS_WEIGHTS_NAME as PEFT_WEIGHTS_NAME
from peft.utils import WEIGHTS_NAME as PEFT_TORCH_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nara_diffusion.config import config_from_fields, is_naras, read_config_file
from nara_diffusion.tuner.state_dict import PEFT_PREFIX, with_current_names

from .format import WEIGHTS_NAME, AdapterPart, check_program, unpack

_USER_AGENT = {"file_type": "nara_weights", "framework": "pytorch"}

Locate = Callable[[str], str]
"""A file's name → its path on this machine; OSError if there is none."""


def read_adapter(
    source: Any,
    denoiser: str,
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    use_safetensors: bool | None = None,
    metadata: Mapping[str, str] | None = None,
    **hub: Any,
) -> dict[str, AdapterPart]:
    """The parts of an adapter by component.

    Args:
        source: a file, a folder, a repository on the hub, or a dict of tensors with its `metadata`.
        denoiser: the component of an adapter in PEFT's format.
        hub: revision, token, cache_dir, force_download, proxies, local_files_only.

    Raises:
        ValueError: there is no file, or it is damaged or of another kind. OSError: the Hub's error.
    """
    if use_safetensors is False:
        raise ValueError("NaRA adapters are read from safetensors files only: leave use_safetensors out.")
    if isinstance(source, Mapping):
        parts = unpack(source, metadata, "The dict")
        return {name: replace(part, tensors=_copied(part.tensors)) for name, part in parts.items()}
    if metadata is not None:
        raise ValueError("metadata is for a dict of tensors: a file has its own.")
    path = Path(source).expanduser()
    if path.is_file():
        return _read_named(path.name, lambda name: _beside(path, name), denoiser)
    if path.is_dir():
        folder = path / subfolder if subfolder else path
        return _read_named(weight_name or _guess(folder), lambda name: _inside(folder, name), denoiser)
    repository = _repository(str(source))

    def download(name: str) -> str:
        return _get_model_file(repository, weights_name=name, subfolder=subfolder, user_agent=_USER_AGENT, **hub)

    return _read_repository(weight_name, download, denoiser)


@contextmanager
def naming(source: Any) -> Iterator[None]:
    """Inside, errors get the name of the adapter's `source` (see `read_adapter`), unless they have it."""
    try:
        yield
    except ValueError as error:
        if not isinstance(source, Mapping) and str(source) in str(error):
            raise
        where = "the dict" if isinstance(source, Mapping) else f"'{source}'"
        raise ValueError(f"The adapter in {where} is refused: {error}") from error


def _read_repository(weight_name: str | None, download: Locate, denoiser: str) -> dict[str, AdapterPart]:
    try:
        return _read_named(weight_name or WEIGHTS_NAME, download, denoiser)
    except OSError as error:
        if weight_name is not None:
            raise
        try:
            return _read_named(PEFT_WEIGHTS_NAME, download, denoiser)
        except OSError:
            raise error from None  # that of the name which was meant


def _read_named(name: str, locate: Locate, denoiser: str) -> dict[str, AdapterPart]:
    path = locate(name)
    tensors, metadata = read_file(path)
    if name == PEFT_WEIGHTS_NAME:
        return {denoiser: _peft_part(path, locate(PEFT_CONFIG_NAME), tensors)}
    return unpack(tensors, metadata, f"'{path}'")


def read_file(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """Tensors and metadata of a safetensors file, copied, so that the file may be overwritten afterwards.

    Raises:
        ValueError: it is cut off or of another format.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: _copy(file.get_tensor(key)) for key in file.keys()}, file.metadata()  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"'{path}' is no whole safetensors file ({error}): download or save it again if it was cut off; other "
            "formats are not read."
        ) from None


def read_peft_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of any adapter in a folder of PEFT, by PEFT's keys.

    Raises:
        ValueError: there is no file of weights, or it is damaged.
    """
    if (folder / PEFT_WEIGHTS_NAME).is_file():
        return read_file(folder / PEFT_WEIGHTS_NAME)[0]
    if not (folder / PEFT_TORCH_WEIGHTS_NAME).is_file():  # PEFT would look for the folder on the Hub
        raise ValueError(
            f"There is no '{PEFT_WEIGHTS_NAME}' beside '{PEFT_CONFIG_NAME}' in '{folder}': PEFT writes both, copy both."
        )
    return load_peft_weights(str(folder), device="cpu")


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: _copy(tensor) for key, tensor in tensors.items()}


def _copy(tensor: Tensor) -> Tensor:
    """A copy of `tensor` that shares no memory and is aligned like a model's weights.

    (The last bits of a product depend on the alignment of its factors, which is arbitrary in a mapped file.)
    """
    return tensor.detach().clone()


def _peft_part(weights: str, config: str, tensors: dict[str, Tensor]) -> AdapterPart:
    check_program(tensors, f"'{weights}'")
    origin, given = f"'{config}'", read_config_file(config)
    if not is_naras(given):
        raise ValueError(
            f"{origin} describes an adapter of type {given.get('peft_type')}, not NARA: load it by "
            "pipe.load_lora_weights(…) or peft.PeftModel.from_pretrained(…)."
        )
    unknown = [key for key in tensors if not key.startswith(PEFT_PREFIX)]
    if unknown:
        raise ValueError(f"'{weights}' holds '{unknown[0]}', which is no key that PEFT writes: damaged.")
    own = with_current_names({key.removeprefix(PEFT_PREFIX): tensor for key, tensor in tensors.items()})
    return AdapterPart(config_from_fields(given, origin), own)


def _beside(path: Path, name: str) -> str:
    return str(path) if name == path.name else _inside(path.parent, name)


def _inside(folder: Path, name: str) -> str:
    path = folder / name
    if not path.is_file() and name == PEFT_CONFIG_NAME:
        raise ValueError(
            f"There is no '{name}' beside '{PEFT_WEIGHTS_NAME}' in '{folder}': PEFT writes both, copy both."
        )
    if not path.is_file():
        raise ValueError(f"There is no file '{name}' in '{folder}': {_content(folder)}")
    return str(path)


def _guess(folder: Path) -> str:
    """The default file name in a folder or repository."""
    if not folder.is_dir():
        raise ValueError(f"There is no folder '{folder}'.")
    if (folder / WEIGHTS_NAME).is_file():
        return WEIGHTS_NAME
    if (folder / PEFT_CONFIG_NAME).is_file():
        return PEFT_WEIGHTS_NAME
    found = [path.name for path in folder.glob("*.safetensors")]
    if len(found) == 1:
        return found[0]
    raise ValueError(f"There is no '{WEIGHTS_NAME}' in '{folder}': {_content(folder)}")


def _content(folder: Path) -> str:
    found = sorted(os.listdir(folder))
    if not found:
        return "the folder is empty."
    weights = [name for name in found if name.endswith(".safetensors")]
    if weights:
        return f"pass weight_name=, one of {', '.join(map(repr, weights))}."
    return f"it holds no safetensors file, but {', '.join(map(repr, found[:4]))}."


def _repository(name: str) -> str:
    """`name`, if it can be one of a repository."""
    looks_like_path = name.startswith((".", "/", "~")) or name.endswith(".safetensors") or "\\" in name
    try:
        validate_repo_id(name)
    except HFValidationError:
        looks_like_path = True
    if looks_like_path:
        raise ValueError(f"There is no file or folder '{name}', and it is no name of a repository.")
    return name
