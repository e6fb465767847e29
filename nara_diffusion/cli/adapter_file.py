"""Reading an adapter from its file, without its base model: configurations, tensors, cores."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME
from peft.utils import SAFETENSORS_WEIGHTS_NAME as PEFT_WEIGHTS_NAME
from torch import Tensor

from nara_diffusion.config import NaraConfig, read_config_file
from nara_diffusion.loaders.file import WEIGHTS_NAME, AdapterPart, by_pattern
from nara_diffusion.loaders.file import AdapterFile as File
from nara_diffusion.loaders.strict import is_core_key
from nara_diffusion.noise.strength import StrengthSchedule
from nara_diffusion.tuner.holder.core_holder import HOLDER_NAME
from nara_diffusion.tuner.holder.core_set import CoreSet, core_group, make_cores

MODEL = "model"
"""The name of the one component of an adapter in PEFT's format."""
_BLOCK = 1 << 20  # bytes that are read at once
_PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))


@dataclass(frozen=True)
class AdapterFile:
    """Attributes:
    path: the path of the file with the tensors.
    parts: {component: its configuration and tensors}; {"model": …} in PEFT's format.
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
        ValueError: there is no NaRA adapter, or it is damaged: A and B of a module are not both there, or not of the
            configuration's rank.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise ValueError(
            f"There is no file or folder '{source}': name a file or folder of save_nara_weights, or a folder of PEFT."
        )
    parts = File.read(path, MODEL).parts
    for component, part in parts.items():
        _check_factors(part, component, source)
    config = (path if path.is_dir() else path.parent) / CONFIG_NAME
    if MODEL in parts and config.is_file():
        _add_origin(parts[MODEL].config, read_config_file(config))
    return AdapterFile(path if path.is_file() else _weights_in(path), parts)


def _add_origin(config: NaraConfig, given: Mapping[str, Any]) -> None:
    """Add where the adapter was made, which adapters that are loaded have no use for: base model and class."""
    base, mapping = given.get("base_model_name_or_path"), given.get("auto_mapping")
    config.base_model_name_or_path = base if isinstance(base, str) else None
    config.auto_mapping = mapping if isinstance(mapping, dict) else None


def _check_factors(part: AdapterPart, component: str, source: str) -> None:
    for name, rank in modules_of(part).items():
        pair = next((pair for pair in _PAIRS if any(f"{name}.{kind}" in part.tensors for kind in pair)), _PAIRS[0])
        A, B = (part.tensors.get(f"{name}.{kind}") for kind in pair)
        where = f"'{source}' is damaged: '{name}' in {component}"
        if A is None or B is None:
            raise ValueError(f"{where} needs A and B, but {pair[0] if A is None else pair[1]} is missing.")
        fits = 2 <= A.dim() <= 5 and B.dim() >= 2 and len(A) == rank and B.numel() > 0
        if not fits or rank % B.shape[1]:  # the groups of a convolution divide r
            raise ValueError(f"{where} has A {tuple(A.shape)} and B {tuple(B.shape)}, expected rank {rank} in both.")


def modules_of(part: AdapterPart) -> dict[str, int]:
    """{adapted module: its rank}."""
    names = dict.fromkeys(key.partition(".lora_")[0] for key in part.tensors if ".lora_" in key)
    return {name: by_pattern(part.config.rank_pattern, name, part.config.r) for name in names}


def core_tensors_of(part: AdapterPart) -> dict[str, Tensor]:
    """{name in the module that holds the cores: tensor} of the cores."""
    prefix = f"{HOLDER_NAME}."
    return {key.removeprefix(prefix): tensor for key, tensor in part.tensors.items() if is_core_key(key)}


def cores_of(part: AdapterPart) -> CoreSet:
    """The cores, with the values of the file.

    Raises:
        ValueError: the file lacks tensors of the cores that its configuration describes, or has others.
    """
    groups: dict[str, int] = {}
    for name, rank in modules_of(part).items():
        group = core_group(part.config, name, rank)
        groups[group] = max(rank, groups.get(group, 0))
    cores = make_cores(part.config, groups)
    try:
        cores.load_state_dict(core_tensors_of(part))
    except RuntimeError as error:
        text = " ".join(str(error).split())
        raise ValueError(f"its cores don't match its configuration, so the file is damaged: {text}") from None
    return cores


def strength_of(config: NaraConfig, levels: Tensor) -> Tensor:
    """The strength (n,) at λ (n,) that the configuration sets."""
    if config.strength is None:
        return torch.ones_like(levels)
    points: Any = config.strength
    return StrengthSchedule(points).at(levels)


def _weights_in(folder: Path) -> Path:
    """The file of a folder that `read_adapter` reads."""
    for name in (WEIGHTS_NAME, PEFT_WEIGHTS_NAME):
        if (folder / name).is_file():
            return folder / name
    return next(folder.glob("*.safetensors"))
