"""What the flags of `nara_flags.training` mean: the window, the optimizer's class, the shipped runs.

The module `adapters` does this for the flags of the adapter.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from nara_diffusion.noise.drawn_levels import NoiseWindow
from nara_diffusion.noise.strength_schedule import StrengthSchedule, within
from nara_flags.parser import merged
from nara_flags.training import OPTIMIZERS, TrainingArguments, WindowArguments

logger = logging.getLogger(__name__)


def schedule_of(args: WindowArguments) -> StrengthSchedule | None:
    """Return the adapter's strength schedule, 0 outside of the window; None without a window.

    The file of a NaRA stores the schedule. The file of a LoRA can't, so the run tells the user how
    to set it.
    """
    window = window_of(args)
    return None if window.is_everything else within(window)


def window_of(args: WindowArguments) -> NoiseWindow:
    """Return the window of noise levels that `args` describe. The default is all of [0, 1]."""
    low, high = args.min_noise_level, args.max_noise_level
    return NoiseWindow(0.0 if low is None else low, 1.0 if high is None else high)


def check_arguments(args: TrainingArguments) -> None:
    """Raise ValueError for a window without levels, or an optimizer that isn't installed.

    `adapters.check_adapter` does the same for the adapter. The `__post_init__` of the arguments
    calls both functions.
    """
    try:
        window_of(args)
    except ValueError as error:
        raise ValueError(f"min_noise_level and max_noise_level: {error}") from error
    optimizer_class(args.optimizer)


def optimizer_class(optimizer: str) -> Any:
    """Return the class of an optimizer. Raise ValueError if its package isn't installed."""
    module, name = OPTIMIZERS[optimizer]
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ValueError(
            f"optimizer {optimizer} needs {package} ({error}): pip install {package}."
        ) from error


CONFIGS = Path(__file__).resolve().parents[2] / "train_scripts" / "configs"
"""The settings of the shipped runs. Only a clone has them, and their models and data."""


def shipped_settings(
    config: Path, given: Mapping[str, Any], own: Sequence[str], *, toy: str, shown: str, advice: str
) -> dict[str, Any]:
    """Return the arguments of a shipped run, without its data if the user gives other data.

    Args:
        config: the file of the shipped run.
        given: the user's arguments.
        own: the arguments that name data, or that belong to the shipped data. If the first of them
            is in `given`, the user gives data. The log then says that the data train the shipped
            model, `toy`, lists the settings `shown`, and gives the `advice`.

    Raises:
        ValueError: the file or the model is missing, as it is outside of a clone.
    """
    values = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}
    for name, value in values.items():
        if str(value).startswith("examples/"):
            values[name] = os.path.relpath(CONFIGS.parents[1] / value)
    model = values.get("pretrained_model_name_or_path", config)
    if not Path(model).exists():
        raise ValueError(
            "give --pretrained_model_name_or_path: only a clone of the repository has the shipped "
            "models."
        )
    if own[0] not in given:
        return values
    both = merged(values, given)
    names = [name for name in shown.split() if name in both and name not in given]
    logger.info("no model was named: your data teach %s, %s", model, toy)
    logger.info("its own settings: %s", ", ".join(f"{name} {both[name]}" for name in names))
    logger.info("for %s", advice)
    return {name: value for name, value in values.items() if name not in own}
