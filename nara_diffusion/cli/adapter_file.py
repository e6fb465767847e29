"""Reading an adapter from its file, without its base model: configurations, tensors, cores."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from peft.utils import SAFETENSORS_WEIGHTS_NAME as PEFT_WEIGHTS_NAME
from torch import Tensor

from nara_diffusion.loaders.format import WEIGHTS_NAME, AdapterPart, is_core_key
from nara_diffusion.loaders.source import read_adapter
from nara_diffusion.loaders.validation import rank_of
from nara_diffusion.tuner.holder.core_holder import HOLDER_NAME
from nara_diffusion.tuner.holder.core_set import CoreSet, core_group, make_cores

MODEL = "model"
"""The name of the only component of PEFT's form."""
_BLOCK = 1 << 20  # bytes that are read at once


@dataclass(frozen=True)
class AdapterFile:
    """Attributes:
    path: the path of the file with the tensors.
    parts: {component: its configuration and tensors}, "model" alone in PEFT's form.
    """

    path: Path
    parts: Mapping[str, AdapterPart]

    @property
    def sha256(self) -> str:
        """The SHA-256 of the file's bytes, in hexadecimal."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
        return digest.hexdigest()


def read(source: str) -> AdapterFile:
    """Read the adapter in a local file or folder.

    Raises:
        ValueError: there is no adapter, or it is damaged.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise ValueError(f"There is no file or folder '{source}': name what save_nara_weights or PEFT wrote.")
    parts = read_adapter(path, MODEL)
    return AdapterFile(path if path.is_file() else _weights_in(path), parts)


def modules_of(part: AdapterPart) -> dict[str, int]:
    """{adapted module: its rank}."""
    names = dict.fromkeys(key.partition(".lora_")[0] for key in part.tensors if ".lora_" in key)
    return {name: rank_of(part.config, name) for name in names}


def core_tensors_of(part: AdapterPart) -> dict[str, Tensor]:
    """The tensors of the cores, by their names below the holder."""
    prefix = f"{HOLDER_NAME}."
    return {key.removeprefix(prefix): tensor for key, tensor in part.tensors.items() if is_core_key(key)}


def cores_of(part: AdapterPart) -> CoreSet:
    """The cores, with the values of the file.

    Raises:
        ValueError: the file's tensors aren't those that its configuration describes.
    """
    groups: dict[str, int] = {}
    for name, rank in modules_of(part).items():
        group = core_group(part.config, name, rank)
        groups[group] = max(rank, groups.get(group, 0))
    cores = make_cores(part.config, groups)
    try:
        cores.load_state_dict(core_tensors_of(part))
    except RuntimeError as error:
        raise ValueError(f"Its cores aren't those of its configuration, so it is damaged: {error}") from None
    return cores


def _weights_in(folder: Path) -> Path:
    """The file of a folder that `read_adapter` reads."""
    for name in (WEIGHTS_NAME, PEFT_WEIGHTS_NAME):
        if (folder / name).is_file():
            return folder / name
    return next(folder.glob("*.safetensors"))
