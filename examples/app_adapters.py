"""The adapters of app.py: found, read, described, and loaded into a pipeline.

A NaRA, as `save_nara_weights`, PEFT or a train script wrote it, is loaded as it is. A LoRA, in PEFT's format or in one
that Diffusers reads, becomes a NaRA whose core is the identity: the same update, and each layer of the file finds its
place, or the load is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft.utils import CONFIG_NAME
from safetensors import SafetensorError, safe_open

from nara_diffusion import StrengthSchedule, from_lora, set_strength
from nara_diffusion.cli.plot import core_curves
from nara_diffusion.config import is_naras, read_config_file
from nara_diffusion.loaders.file import METADATA_KEY, AdapterFile, AdapterPart
from nara_diffusion.loaders.insertion import TEXT_ENCODER, adapters_of
from nara_diffusion.loaders.strict import is_core_key
from nara_diffusion.loaders.weights import adaptable_models

LEVELS = torch.linspace(0, 1, 101)  # λ at which curves are drawn
Points = Sequence[tuple[float, float]]  # (λ, strength), as StrengthSchedule takes them
FILES: dict[str, Any] = {
    "allow_patterns": ["*.safetensors", CONFIG_NAME, "scheduler/scheduler_config.json"],
    "ignore_patterns": ["*/*.safetensors"],  # of checkpoints
}
"""What is downloaded of a repository."""
FULL_STRENGTH: Points = ((0.0, 1.0), (1.0, 1.0))


@dataclass(frozen=True)
class Adapter:
    """Attributes:
    source: as the user named it. path: where it is on this machine. is_lora: without a core.
    summary: what it is, in a line.
    distance: ‖C(λ) − I‖ / ‖I‖ at LEVELS, the mean over its cores; zeros for a LoRA.
    points: the strength that it brings.
    """

    source: str
    path: Path
    is_lora: bool
    summary: str
    distance: list[float]
    points: Points


def read(source: str) -> Adapter:
    """The adapter in a file, a folder or a repository on the Hub.

    Raises:
        ValueError: nothing is there, or something else, or it is damaged.
    """
    path = find(source)
    try:
        parts = AdapterFile.read(path, "denoiser").parts
    except ValueError:
        if not is_lora(path):
            raise
        return Adapter(source, path, True, "LoRA: C(λ) = I", [0.0] * len(LEVELS), FULL_STRENGTH)
    part = next((part for name, part in parts.items() if not name.startswith(TEXT_ENCODER)), None)
    if part is None:
        raise ValueError(f"'{source}' adapts text encoders alone, which run before there is a λ.")
    distances, _ = core_curves(part, LEVELS)  # (g, n), of g cores
    return Adapter(source, path, False, _summary(part), distances.mean(0).tolist(), _points_of(part))


def find(source: str) -> Path:
    """The file or folder of that name, or the downloaded repository.

    Raises:
        ValueError: there is none.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    check_repository_name(source)
    try:
        return Path(snapshot_download(source, **FILES))
    except Exception as error:  # the Hub's, or the network's
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"There is no file or folder '{source}', and no repository of that name was reached: {reason}"
        ) from error


def check_repository_name(source: str) -> None:
    """Refuse what is no file or folder, and can't be on the Hub.

    Raises:
        ValueError: no repository can have that name.
    """
    try:
        validate_repo_id(source)
    except HFValidationError:
        raise ValueError(f"There is no file or folder '{source}', and no repository can have that name.") from None


def is_lora(path: Path) -> bool:
    """Whether a file or a folder holds an adapter without a core."""
    if (path / CONFIG_NAME).is_file():
        return not is_naras(read_config_file(path / CONFIG_NAME))
    for file in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                keys, metadata = list(tensors.keys()), tensors.metadata() or {}
        except SafetensorError:
            return False
        if METADATA_KEY in metadata or any(map(is_core_key, keys)):
            return False
        if any("lora" in key for key in keys):
            return True
    return False


def _summary(part: AdapterPart) -> str:
    config, count = part.config, len(part.modules)
    return f"NaRA: core {config.core_type}, rank {config.r}, {count} layer{'s' * (count != 1)}"


def _points_of(part: AdapterPart) -> Points:
    points: Any = part.config.strength
    return FULL_STRENGTH if points is None else StrengthSchedule(points).points


def load(pipe: Any, adapter: Adapter, name: str) -> None:
    """Load the adapter into the pipeline, without the schedule that it brings: its points have that.

    Raises:
        ValueError: it is for another base model, or damaged. The pipeline is unchanged.
    """
    if adapter.is_lora:
        from_lora(adapter.path, pipe, name, core_type="identity")
    else:
        pipe.load_nara_weights(adapter.path, adapter_name=name)
    for model in adaptable_models(pipe).values():
        if name in adapters_of(model):
            set_strength(model, name, None)


def weight(pipe: Any, name: str, points: Points) -> Any:
    """The value of `set_adapters`' adapter_weights for these points (λ, strength).

    A strength that is the same for all λ is a number, for text encoders too. Those run before there is a λ, so that
    beside a schedule they have strength 1.
    """
    schedule = StrengthSchedule(points)
    strengths = {strength for _, strength in schedule.points}
    if len(strengths) == 1:
        return strengths.pop()
    adapted = [component for component, model in adaptable_models(pipe).items() if name in adapters_of(model)]
    if not any(component.startswith(TEXT_ENCODER) for component in adapted):
        return schedule
    return {component: 1.0 if component.startswith(TEXT_ENCODER) else schedule for component in adapted}
