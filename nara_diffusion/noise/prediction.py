"""Compare what a denoiser predicts with what a scheduler expects.

    path                  x_t                                prediction
    variance preserving   √ᾱ x + √(1 − ᾱ) ε, ᾱ_N > 0         ε, v = √ᾱ ε − √(1 − ᾱ) x, or x
    zero terminal SNR     the same with ᾱ_N = 0              v or x: at ᾱ = 0, ε does not determine x
    rectified flow        (1 − σ) x + σ ε                    ε − x

An adapter from an earlier version of this package may predict something other than its base does.
`NaraConfig.scheduler` then describes the scheduler that the adapter needs. With a scheduler that
expects another prediction, a pipeline would produce noise without raising an error. The two are
therefore compared when an adapter is loaded and at each forward.
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
"""Fields that may differ between a base's scheduler and the one that an adapter needs."""
TIMESTEP_SETTINGS = ("timestep_spacing", "shift_terminal")
"""Fields of a scheduler that a few-step adapter was trained with."""
_PATHS = frozenset({"use_flow_sigmas", "rescale_betas_zero_snr"})
"""Options that change the path. Not every class has them."""
KINDS = ("epsilon", "v_prediction", "sample", FLOW)


class Prediction(NamedTuple):
    """The kind and path of a prediction; kinds are named as in Diffusers' `prediction_type`."""

    kind: str
    path: str = "variance preserving"

    def __str__(self) -> str:
        return (
            self.kind
            if self.path in ("variance preserving", "rectified flow")
            else f"{self.kind} on {self.path}"
        )


def prediction_of(class_name: str, config: Mapping[str, Any]) -> Prediction | None:
    """Return the prediction that a Diffusers scheduler expects, or None if its config names none."""
    if class_name.startswith("FlowMatch"):
        return Prediction(FLOW, "rectified flow")
    kind = config.get("prediction_type")
    if kind is None:
        return None
    if config.get("use_flow_sigmas"):
        return Prediction(kind, "rectified flow")
    return Prediction(kind, ZERO_SNR) if config.get("rescale_betas_zero_snr") else Prediction(kind)


def prediction_in(fields: Mapping[str, Any]) -> Prediction | None:
    """Return the prediction that the scheduler fields of an adapter's configuration describe."""
    return prediction_of(fields["_class_name"], fields)


def prediction_by(scheduler: Any) -> Prediction | None:
    """Return the prediction that `scheduler` expects, or None if there is no scheduler."""
    if scheduler is None:
        return None
    unread = _unread_paths(type(scheduler))
    config = {name: value for name, value in scheduler.config.items() if name not in unread}
    return prediction_of(type(scheduler).__name__, config)


@cache
def _unread_paths(kind: type) -> frozenset[str]:
    """Return the options that a scheduler class ignores.

    The configuration may still contain values for them if `from_config` took them from another
    class.
    """
    parameters = inspect.signature(kind).parameters
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return frozenset() if passes_on else _PATHS - frozenset(parameters)


def check_expected(scheduler: Any, fields: Mapping[str, Any]) -> None:
    """Raise ValueError unless `scheduler` expects the prediction that the adapter makes.

    `fields` is its `NaraConfig.scheduler`.
    """
    expected, predicted = prediction_by(scheduler), prediction_in(fields)
    if expected != predicted:
        raise ValueError(
            f"The adapter was trained to predict {predicted}, but {type(scheduler).__name__} of the pipeline expects "
            f"{expected}. Set one that fits first: {how_to_set(fields)}."
        )


def how_to_set(fields: Mapping[str, Any]) -> str:
    """Return a line of code, for error messages, that sets a scheduler with these fields."""
    options = (f"{name}={fields[name]!r}" for name in _NAMED if fields.get(name) is not None)
    given = ", ".join(("pipe.scheduler.config", *options))
    return f"pipe.scheduler = {fields['_class_name']}.from_config({given})"


def flow_shift(fields: Mapping[str, Any]) -> float | None:
    """Return the σ shift of a rectified-flow scheduler, or None for any other scheduler."""
    prediction = prediction_in(fields)
    if prediction is None or prediction.kind != FLOW:
        return None
    return float(fields.get("flow_shift") or fields.get("shift") or 1.0)


def other_sampling(pipe: Any, few_steps: Mapping[str, Any]) -> str | None:
    """Return a message if a pipeline's sampling settings do not suit a few-step adapter, else None.

    The message names the settings and includes the lines of code that correct them.
    """
    scheduler = pipe.scheduler
    # the scheduler of a flow has no number before its first call
    steps = getattr(scheduler, "num_inference_steps", None)
    wanted = few_steps["num_inference_steps"]
    if steps is None:  # no call is in progress, as in training
        return None
    found = [] if steps == wanted else [f"{steps} steps"]
    guidance = getattr(pipe, "_guidance_scale", 1.0)
    if guidance > 1:
        found.append(f"guidance_scale {guidance:g}")
    for name in TIMESTEP_SETTINGS:
        setting = few_steps.get(name)
        if setting is not None and scheduler.config.get(name) != setting:
            found.append(f"{type(scheduler).__name__} with other timesteps")
    if not found:
        return None
    lines = [few_steps.get("scheduler"), f"pipe(…, num_inference_steps={wanted}, guidance_scale=1)"]
    return f"{', '.join(found)}: {'; '.join(filter(None, lines))}"
