"""The pipeline's present scheduler: the components that it serves, and the adapters that it must fit.

An adapter of an earlier version may have been trained to predict something else than its base. Its configuration then
has the `scheduler` that samples it. Such an adapter loads only where the pipeline's scheduler expects that prediction.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from nara_diffusion.noise.prediction import check_expected
from nara_diffusion.tuner.holder import holder_of

from .insertion import unwrapped

DENOISERS = (
    "unet",
    "transformer",
    "transformer_2",
    "unconditional_transformer",
    "prior",
    "decoder",
)
"""The components of pipelines that denoise: a second transformer for little noise (Wan 2.2) or for guidance (Ideogram
4), a prior of embeddings and a decoder of them (unCLIP, Kandinsky, Würstchen, Stable Cascade)."""


def check_schedulers(pipe: Any, parts: Mapping[str, Any]) -> None:
    """Raise ValueError if an adapter in `parts` needs another prediction than the pipeline's scheduler expects.

    Args:
        parts: component → what has the adapter's configuration as `config`.
    """
    for part in parts.values():
        check_expected(getattr(pipe, "scheduler", None), part.config.scheduler)


def read_schedule_of(pipe: Any) -> None:
    """Let the adapters of the pipeline's denoisers read N and the timestep's meaning from its present scheduler."""
    for name in DENOISERS:
        model = getattr(pipe, name, None)
        if not isinstance(model, nn.Module):
            continue
        holder = holder_of(unwrapped(getattr(model, "_orig_mod", model)))
        if holder is not None:
            holder.finder.add_pipeline(pipe)


def denoiser_name(pipe: Any) -> str:
    """The component that an adapter without named parts is for. Raises ValueError if the pipeline has no denoiser."""
    for name in DENOISERS:
        if isinstance(getattr(pipe, name, None), nn.Module):
            return name
    raise ValueError(
        f"{type(pipe).__name__} has none of {', '.join(DENOISERS)}, one of which a NaRA adapts: its components are "
        f"{', '.join(map(repr, pipe.components))}."
    )
