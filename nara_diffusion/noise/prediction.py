"""What a denoiser predicts, on which path from data to noise, and what a scheduler expects of it.

    path                  x_t                                prediction
    variance preserving   √ᾱ x + √(1 − ᾱ) ε, ᾱ_N > 0         ε, v = √ᾱ ε − √(1 − ᾱ) x, or x
    zero terminal SNR     the same with ᾱ_N = 0              v or x: at ᾱ = 0 an ε says nothing of x
    rectified flow        (1 − σ) x + σ ε                    ε − x

An adapter of an earlier version may predict something else than its base; `NaraConfig.scheduler` then has its
scheduler. One that expects another prediction gives noise without an error. So loading, and each forward, compares it
with the present scheduler of the pipeline that loaded the adapter.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

FLOW = "flow_prediction"
ZERO_SNR = "zero terminal SNR"
_NAMED = (
    "prediction_type",
    "use_flow_sigmas",
    "flow_shift",
    "shift",
    "rescale_betas_zero_snr",
    "timestep_spacing",
)
"""Fields in which a base's scheduler may differ from the one that an adapter needs."""
_PATHS = frozenset({"use_flow_sigmas", "rescale_betas_zero_snr"})
"""Options that change the path; not every class has them."""
KINDS = ("epsilon", "v_prediction", "sample", FLOW)


class Prediction(NamedTuple):
    """Kind and path; kinds have the names of Diffusers' `prediction_type`."""

    kind: str
    path: str = "variance preserving"

    def __str__(self) -> str:
        return (
            self.kind
            if self.path in ("variance preserving", "rectified flow")
            else f"{self.kind} on {self.path}"
        )


def prediction_of(class_name: str, config: Mapping[str, Any]) -> Prediction | None:
    """The prediction that a Diffusers scheduler expects of its denoiser; None if its configuration has none."""
    if class_name.startswith("FlowMatch"):
        return Prediction(FLOW, "rectified flow")
    kind = config.get("prediction_type")
    if kind is None:
        return None
    if config.get("use_flow_sigmas"):
        return Prediction(kind, "rectified flow")
    return Prediction(kind, ZERO_SNR) if config.get("rescale_betas_zero_snr") else Prediction(kind)


def prediction_in(fields: Mapping[str, Any]) -> Prediction | None:
    """`prediction_of` the scheduler fields that an adapter carries."""
    return prediction_of(fields["_class_name"], fields)


def prediction_by(scheduler: Any) -> Prediction | None:
    """`prediction_of` a scheduler; None if there is no scheduler."""
    if scheduler is None:
        return None
    unread = _unread_paths(type(scheduler))
    config = {name: value for name, value in scheduler.config.items() if name not in unread}
    return prediction_of(type(scheduler).__name__, config)


@cache
def _unread_paths(kind: type) -> frozenset[str]:
    """Options that a class doesn't have, though `from_config` keeps another class's in its configuration."""
    parameters = inspect.signature(kind).parameters
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return frozenset() if passes_on else _PATHS - frozenset(parameters)


def check_expected(scheduler: Any, fields: Mapping[str, Any] | None) -> None:
    """Raise ValueError if `scheduler` expects another prediction than that of an adapter.

    Args:
        scheduler: the pipeline's present one; one without a `prediction_type`, or None, is not judged.
        fields: `NaraConfig.scheduler` of the adapter; None where it predicts what its base predicts.
    """
    if fields is None:
        return
    expected, predicted = prediction_by(scheduler), prediction_in(fields)
    if expected != predicted:
        raise ValueError(
            f"The adapter was trained to predict {predicted}, but {type(scheduler).__name__} of the pipeline expects "
            f"{expected}. Set one that fits first: {how_to_set(fields)}."
        )


def how_to_set(fields: Mapping[str, Any]) -> str:
    """The line that sets a scheduler with these fields, for messages."""
    options = (f"{name}={fields[name]!r}" for name in _NAMED if fields.get(name) is not None)
    given = ", ".join(("pipe.scheduler.config", *options))
    return f"pipe.scheduler = {fields['_class_name']}.from_config({given})"


def flow_shift(fields: Mapping[str, Any]) -> float | None:
    """The shift of σ of a scheduler for a rectified flow; None if it isn't one."""
    prediction = prediction_in(fields)
    if prediction is None or prediction.kind != FLOW:
        return None
    return float(fields.get("flow_shift") or fields.get("shift") or 1.0)
