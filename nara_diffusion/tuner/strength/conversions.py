"""Where an adapter that converts the model's prediction has strength 0, so that the model predicts what its base does.

The pipeline's scheduler is the adapter's at every step, and takes it for something else.
"""

from __future__ import annotations

import logging
from typing import Any

from nara_diffusion.noise.schedulers.prediction import prediction_in
from nara_diffusion.tuner.holder.core_holder import holder_of

from .layers import layers_of

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
    holder = holder_of(root)
    scaled = [] if holder is None else holder.strengths.get(adapter_name, {}).values()
    if not scaled:
        scales = [layer.scaling[adapter_name] for layer in layers_of(root, adapter_name).values()]
        return None if any(scales) else "at every noise level"
    schedules = [of.schedule for of in scaled if of.schedule is not None]
    if len(schedules) < len(scaled):
        return None  # some layers have a number
    levels = sorted({0.0, 1.0, *(level for schedule in schedules for level, _ in schedule.points)})
    off = [level for level in levels if not any(float(schedule(level)) for schedule in schedules)]
    return f"at noise_level {', '.join(f'{level:g}' for level in off)}" if off else None
