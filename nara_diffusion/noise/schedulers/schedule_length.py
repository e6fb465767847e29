"""N of the discrete schedule at work: `num_train_timesteps` of the schedulers in the calls around a forward."""

from __future__ import annotations

from .timestep_meaning import schedulers_at_work


def lengths_at_work() -> list[int]:
    """N of the schedulers of the innermost call that has any, each once, ascending; empty if none has an N."""
    configs = [getattr(scheduler, "config", None) or {} for scheduler in schedulers_at_work()]
    return sorted({length for config in configs if (length := config.get("num_train_timesteps"))})
