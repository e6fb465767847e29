"""Where an adapter that converts the model's prediction has strength 0, so that the model predicts what its base does.

The pipeline's scheduler is the adapter's at every step, and takes it for something else.
"""

from __future__ import annotations

import logging
from typing import Any

from nara_diffusion.noise.schedulers.prediction import prediction_in

from .layers import layers_of, live_strengths

logger = logging.getLogger(__name__)


def warn_where_off(root: Any, adapter_name: str) -> None:
    """Warn if the adapter carries a scheduler, and has strength 0 at all noise levels or at some."""
    fields = getattr(root.peft_config[adapter_name], "scheduler", None)
    where = _where_off(root, adapter_name) if fields else None
    if fields and where:
        logger.warning(
            "Adapter '%s' has strength 0 %s, where the model predicts what its base does, and not %s as the adapter's "
            "scheduler expects: images go wrong. Give it another strength there, or switch it off as a whole, by "
            "pipe.disable_lora() or by pipe.set_adapters(…) without it, which set the base's scheduler.",
            adapter_name,
            where,
            prediction_in(fields),
        )


def _where_off(root: Any, adapter_name: str) -> str | None:
    on = {name for name, layer in layers_of(root, adapter_name).items() if layer.scaling[adapter_name]}
    if not on:
        return "at every noise level"
    live = live_strengths(root, adapter_name)
    if on - live.keys():
        return None  # some layers have a number alone
    schedules = {live[name] for name in on}
    levels = sorted({0.0, 1.0, *(level for schedule in schedules for level, _ in schedule.points)})
    off = [level for level in levels if not any(float(schedule(level)) for schedule in schedules)]
    return f"at noise_level {', '.join(f'{level:g}' for level in off)}" if off else None
