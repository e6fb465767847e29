"""Find, read and write tensor files on disk or on the Hub, and recognise those of a NaRA."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.hub_utils import _get_model_file
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME as PEFT_CONFIG_NAME
from peft.utils import SAFETENSORS_WEIGHTS_NAME as PEFT_WEIGHTS_NAME
from peft.utils import WEIGHTS_NAME as PEFT_PICKLE_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nara_diffusion.config import NaraPeftType
from nara_diffusion.cores.core_set import is_core_key
from nara_diffusion.strict import check_loaded
from nara_diffusion.utils.repositories import is_out_of_reach
from nara_diffusion.utils.wording import listed

from .time_aware import format_of
from .tlora import LYCORIS_CONFIG_NAME

WEIGHTS_NAME = "pytorch_nara_weights.safetensors"
OTHER_WEIGHTS_NAMES = ("pytorch_lora_weights.safetensors", "lora.pt")
"""Names in folders of other projects: Diffusers', LyCORIS' and SimpleTuner's; T-LoRA's for FLUX."""
METADATA_KEY = "nara_adapter_metadata"
"""The key of the configurations in the metadata of a pipeline's file."""


def is_nara(path: Path) -> bool:
    """Return whether a file or folder contains a NaRA, or another adapter that depends on λ.

    For a file that can't be read, return False. Code that reads the file later raises the error.

    Raises:
        ValueError: a folder's adapter_config.json is damaged, or has another type but a core.
    """
    config = path / PEFT_CONFIG_NAME
    if not config.is_file():
        files = [path, *(path / name for name in (PEFT_WEIGHTS_NAME, *OTHER_WEIGHTS_NAMES))]
        return (path / WEIGHTS_NAME).is_file() or any(map(_depends_on_noise, files))
    fields = read_config_file(config)
    is_of_nara = fields["peft_type"] == NaraPeftType.NARA.value
    if not is_of_nara and "core_type" in fields:
        raise ValueError(
            f"'{config}' has the fields of a NaRA, but peft_type is {fields['peft_type']!r}, not "
            f"{NaraPeftType.NARA.value!r}. The file is damaged: download or save it again."
        )
    return is_of_nara


def _depends_on_noise(file: Path) -> bool:
    """Return whether the names in a file are those of a NaRA or of a `time_aware` format."""
    try:
        if file.suffix == ".pt":
            return format_of(read_pickle(file)) is not None
        with safe_open(file, framework="pt", device="cpu") as content:
            keys = list(content.keys())
            is_of_nara = METADATA_KEY in (content.metadata() or {}) or any(map(is_core_key, keys))
            return is_of_nara or format_of(keys) is not None
    except (OSError, SafetensorError, ValueError):
        return False


def is_nara_for_peft(source: str, subfolder: str | None = None, **hub: object) -> bool:
    """Return whether a folder or repository that PEFT is about to load contains a NaRA adapter.

    Raises:
        ValueError: a folder's configuration is that of a LoRA, but its weights have more; or the
            adapter is in another format than PEFT's.
    """
    folder = Path(source, subfolder or "")
    if (folder / PEFT_CONFIG_NAME).is_file():
        is_of_nara = is_nara(folder)
        if not is_of_nara and is_nara(folder / PEFT_WEIGHTS_NAME):
            raise ValueError(
                f"'{folder}' contains more than a LoRA, such as a Tc-LoRA, and PEFT would load only A and B. Load it "
                "with pipe.load_nara_weights."
            )
        return is_of_nara
    if is_nara(folder):
        raise ValueError(
            f"'{folder}' depends on the noise level but isn't a folder in PEFT's format: it has no {PEFT_CONFIG_NAME}. "
            "Load it with pipe.load_nara_weights, or write such a folder with nara convert --to peft."
        )
    try:
        kind = PeftConfig._get_peft_type(source, subfolder=subfolder, **hub)
    except Exception:  # PEFT is about to raise its own error
        return False
    return kind == NaraPeftType.NARA.value


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
            f"There is no file or folder '{source}': pass the path of an adapter's file or folder."
        )
    names = (
        [weight_name] if weight_name else [WEIGHTS_NAME, PEFT_WEIGHTS_NAME, *OTHER_WEIGHTS_NAMES]
    )
    errors: list[OSError] = []
    for name in names:
        try:
            path = _download(str(source), name, subfolder, hub)
            if name == PEFT_WEIGHTS_NAME:
                _download(str(source), PEFT_CONFIG_NAME, subfolder, hub)
        except OSError as error:
            errors.append(error)
            if is_out_of_reach(error):
                break
        else:
            if name not in (WEIGHTS_NAME, PEFT_WEIGHTS_NAME):
                with suppress(OSError):  # most repositories have none
                    _download(str(source), LYCORIS_CONFIG_NAME, subfolder, hub)
            return path
    raise errors[0]


def _download(repository: str, name: str, subfolder: str | None, hub: Mapping[str, Any]) -> Path:
    agent = {"file_type": "nara_weights", "framework": "pytorch"}
    try:
        return Path(
            _get_model_file(
                repository, weights_name=name, subfolder=subfolder, user_agent=agent, **hub
            )
        )
    except OSError as error:
        if not is_out_of_reach(error):
            raise
        raise OSError(
            f"'{repository}' is not a local folder, and the Hub can't be reached to look for a repository with that "
            "name. Check your connection, or pass a local file or folder."
        ) from error


def _in_folder(folder: Path, weight_name: str | None) -> Path:
    """Return the file `weight_name` in a folder or, if None, NaRA's, PEFT's or the only file."""
    present = sorted(path.name for path in folder.glob("*.safetensors") if path.is_file())
    only = present if len(present) == 1 else []
    names = (
        [weight_name]
        if weight_name
        else [WEIGHTS_NAME, PEFT_WEIGHTS_NAME, *only, *OTHER_WEIGHTS_NAMES]
    )
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(
        f"There is no '{weight_name or WEIGHTS_NAME}' in '{folder}': it has "
        f"{listed(present) or 'no safetensors file'}. Pass another folder or, to load_nara_weights, weight_name."
    )


def check_peft_weights(source: str | os.PathLike[str], subfolder: str | None = None) -> None:
    """Raise ValueError if a local folder, which PEFT is about to read, has no file of weights."""
    folder = Path(source, subfolder or "")
    if folder.is_dir() and not (folder / PEFT_PICKLE_NAME).is_file():
        _in_folder(folder, PEFT_WEIGHTS_NAME)


def read_config_file(path: Path) -> dict[str, Any]:
    """Return the fields of an adapter_config.json.

    Raises:
        ValueError: the file is damaged, or has no `peft_type`. The message names the file.
    """
    try:
        fields = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"'{path}' can't be read ({error}). The file is damaged: download or save it again."
        ) from None
    if not isinstance(fields.get("peft_type"), str):
        raise ValueError(
            f"'{path}' has no peft_type, so it describes no adapter: download or save it again."
        )
    return fields


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """Return the tensors and metadata of a safetensors file, or the tensors of a .pt file.

    Tensors are copied, so the file may be overwritten afterwards. No code of a .pt file is run.

    Raises:
        ValueError: the file is truncated, has another format, or a .pt file has other objects.
    """
    if path.suffix == ".pt":
        return read_pickle(path), None
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {key: copied(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118
            return tensors, file.metadata()
    except SafetensorError as error:
        raise ValueError(
            f"'{path}' is not a complete safetensors file ({error}). Download or save it again if it "
            "was cut off; other formats are not read."
        ) from None


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file of `torch.save`, without running its code.

    Raises:
        ValueError: the file is damaged, or has other objects than tensors.
    """
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises errors of any type for a damaged file
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"'{path}' is not a complete file of torch.save with tensors only ({reason}). Download or save it again."
        ) from None
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise ValueError(f"'{path}' has other objects than tensors by their names.")
    return {str(key): copied(tensor) for key, tensor in tensors.items()}


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


def read_peft_tensors(
    source: str | Path, subfolder: str | None = None, **hub: Any
) -> dict[str, Tensor]:
    """Return the tensors of an adapter in PEFT's format, of any method, by PEFT's keys."""
    tensors, _ = read_tensors(locate(source, PEFT_WEIGHTS_NAME, subfolder, hub))
    return tensors


def load_peft_adapter(model: nn.Module, source: str | Path, **options: Any) -> PeftModel:
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
    missing, surplus = sorted(loading["missing_keys"]), sorted(loading["unexpected_keys"])
    if missing or surplus:
        raise ValueError(
            f"The weights in '{folder}' don't fit {kind.__name__}: {listed(missing) or 'nothing'} is missing, and "
            f"{listed(surplus) or 'nothing'} is unexpected. Was it written by another version, or for another model? "
            "Save it again."
        )
    return model
