"""What the flags of `nara_flags.training` mean: the window, the optimizer, the method, the shipped runs.

Methods of PEFT are named by their PeftType in lower case. Some names stand for a method with fixed
fields: `dora` is `lora` with use_dora. The module `adapters` builds them.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PromptLearningConfig

from nara_diffusion.noise.level import NoiseWindow
from nara_diffusion.noise.strength_schedule import StrengthSchedule, within
from nara_flags.parser import hint, merged
from nara_flags.training import OPTIMIZERS, AdapterArguments, TrainingArguments, WindowArguments

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


_REFUSED = {
    "adalora": "needs an extra step after each optimizer step, to drop directions",
    "xlora": "mixes adapters that are trained already",
}


@dataclass(frozen=True)
class Method:
    """A method that `--adapter` can name.

    Attributes:
        name: the PeftType in lower case, or "full".
        title: the usual name of the method.
        source: the publication; "PEFT" for PEFT's other methods.
        fixed: the configuration fields that the method's name sets.
    """

    name: str
    title: str
    source: str = "PEFT"
    fixed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> Any:
        """The configuration class; None for full fine-tuning and for unknown names."""
        return PEFT_TYPE_TO_CONFIG_MAPPING.get(self.name.upper())  # type: ignore[call-overload]

    @property
    def family(self) -> Literal["nara", "lora", "other", "prompt", "full"]:
        """The kind of method: with a core, LoRA, other PEFT method, virtual tokens, all weights."""
        if self.name in ("nara", "lora", "full"):
            return self.name  # type: ignore[return-value]
        return "prompt" if issubclass(self.config, PromptLearningConfig) else "other"


_NARA = "arXiv 2605.29716"
_KNOTS = {"core_type": "knots", "core_sharing": "layer", "core_scale": 1.0}
NAMED = {
    "nara": Method("nara", "NaRA", _NARA),
    "nara_dora": Method("nara", "NaRA-DoRA", _NARA, {"use_dora": True}),
    "nara_c": Method("nara", "NaRA-C", _NARA, {"core_type": "constant"}),
    "nara_knots": Method("nara", "NaRA-Knots", "RESULTS.md", _KNOTS),
    "tlora": Method("nara", "T-LoRA", "arXiv 2507.05964", {"core_type": "rank_mask"}),
    "multi_lora": Method("nara", "Multi-LoRA", _NARA, {"core_type": "bins"}),
    "lora": Method("lora", "LoRA", "arXiv 2106.09685"),
    "dora": Method("lora", "DoRA", "arXiv 2402.09353", {"use_dora": True}),
    "hira": Method("hira", "HiRA", "ICLR 2025"),
    "prompt_tuning": Method("prompt_tuning", "Prompt tuning", "arXiv 2104.08691"),
    "p_tuning": Method("p_tuning", "P-tuning", "arXiv 2103.10385"),
    "full": Method("full", "full fine-tuning", "all weights"),
}
"""{value of --adapter: method}. PEFT's other methods keep their own names."""


def method_of(args: AdapterArguments) -> Method:
    """Return the method that `args.adapter` names.

    Raises:
        ValueError: the method is unknown or can't be trained here.
    """
    chosen = args.adapter
    method = NAMED.get(chosen, Method(chosen, chosen.replace("_", " ")))
    if chosen in _REFUSED:
        raise ValueError(
            f"adapter {chosen} can't be trained here: it {_REFUSED[chosen]}. Use nara, lora or dora."
        )
    if chosen != "full" and (method.config is None or chosen != chosen.lower()):
        names = [*NAMED, *(str(kind.value).lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING)]
        raise ValueError(
            f"adapter is {chosen!r}, which is not a method: {hint(chosen, dict.fromkeys(names))}"
        )
    return method
