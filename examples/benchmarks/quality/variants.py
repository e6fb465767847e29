"""NaRA with other settings than the published ones, each under a name of its own; NaRA itself stays beside them.

"nara_smooth": ("nara", {"fourier_scale": 1.0})        what it is called, what it is made of
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "nara_knots_dora": ("nara_knots", {"use_dora": True}),
}

NOT_AWARE = ("nara_c",)  # of those whose name begins so


def resolve(method: str) -> tuple[str, Mapping[str, Any]]:
    """The method that a name stands for, and the settings that come with it."""
    return VARIANTS.get(method, (method, {}))


def is_noise_aware(method: str) -> bool:
    """Whether it is a NaRA, which the controls are made for."""
    return method.startswith("nara") and method not in NOT_AWARE
