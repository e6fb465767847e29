"""Restrict adapters to windows of λ.

    pipe.load_nara_weights([("early.safetensors", (0.5, 1)), ("late.safetensors", (0, 0.5))])

Each window is an adapter of its own. Its strength is 1 where low ≤ λ < high (and at λ = 1 if high
is 1), and 0 elsewhere. A plain LoRA becomes a NaRA with C = I, so its window is saved with it.

Wan 2.2 has two denoisers: `transformer` runs at λ ≥ `boundary_ratio`, and `transformer_2` below. A
window goes into those that run inside it, whichever of them the file names.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from nara_diffusion.config import NaraConfig
from nara_diffusion.noise.level import NoiseWindow
from nara_diffusion.noise.strength_schedule import within
from nara_diffusion.tuner.strength import check_strength, give_strength, strength_of

from .adapter_part import AdapterPart, config_from_fields, config_to_fields
from .components import TEXT_ENCODER, Pipeline, adapters_of, denoiser_name
from .file import AdapterFile
from .tensor_files import PEFT_WEIGHTS_NAME, is_nara, locate

_EXAMPLE = '[("early.safetensors", (0.5, 1)), ("late.safetensors", (0, 0.5))]'


def checked_windows(windows: list[Any]) -> list[tuple[Any, NoiseWindow]]:
    """Return the file and the window of each entry.

    Raises:
        ValueError: an entry has another form, or its bounds do not satisfy 0 ≤ low < high ≤ 1.
    """
    checked = []
    for entry in windows:
        try:
            source, (low, high) = entry
            checked.append((os.fspath(source), NoiseWindow(low, high)))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"A window is {entry!r} ({error}): pass pairs of a file and its bounds, {_EXAMPLE}."
            ) from None
    if not checked:
        raise ValueError(f"The list of windows is empty: pass e.g. {_EXAMPLE}.")
    return checked


def denoisers_inside(pipe: Pipeline, window: NoiseWindow) -> list[str]:
    """Return the names of the pipeline's denoisers that run at a λ inside the window."""
    boundary = getattr(getattr(pipe, "config", None), "boundary_ratio", None)
    if boundary is None or getattr(pipe, "transformer_2", None) is None:
        return [denoiser_name(pipe)]
    names = ["transformer"] if window.high > boundary else []
    return [*names, "transformer_2"] if window.low < boundary else names


def is_lora(
    source: str | os.PathLike[str], *, weight_name: str | None, subfolder: str | None, hub: Any
) -> bool:
    """Return whether a file, folder or repository contains a plain LoRA, and no NaRA."""
    try:
        path = locate(source, weight_name, subfolder, hub)
    except OSError:  # a repository without a NaRA's file
        return True
    folder = path.parent if path.name == PEFT_WEIGHTS_NAME else path
    return not (is_nara(path) or is_nara(folder))


def load_lora_inside(
    pipe: Any,
    window: NoiseWindow,
    source: str | os.PathLike[str],
    adapter_name: str,
    *,
    hub: Mapping[str, Any],
    **options: Any,
) -> None:
    """Load a plain LoRA as Diffusers does, into the denoisers inside the window.

    Raises:
        ValueError: Diffusers found no layer for it.
    """
    for name in denoisers_inside(pipe, window):
        into = {"load_into_transformer_2": True} if name == "transformer_2" else {}
        with warnings.catch_warnings():  # several adapters are intended
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            pipe.load_lora_weights(source, adapter_name=adapter_name, **options, **hub, **into)
        if adapter_name not in adapters_of(getattr(pipe, name)):
            raise ValueError(
                f"Diffusers found no layer of {name} for it. Was it made for another base model?"
            )


def parts_inside(
    pipe: Pipeline, window: NoiseWindow, read: Callable[[str], AdapterFile]
) -> dict[str, AdapterPart]:
    """Return the parts of a file, or its only transformer's part for each denoiser inside the window.

    Args:
        read: a function that reads the file for a denoiser. A T-LoRA's start factors are those of
            the denoiser's own weights.
    """
    inside: dict[str, AdapterPart] = {}
    for name in denoisers_inside(pipe, window):
        parts = read(name).parts
        if len(parts) == 1 and parts.keys() <= {"transformer", "transformer_2"}:
            parts = dict.fromkeys([name], *parts.values())
        inside |= parts
    return inside


def restrict(models: Mapping[str, nn.Module], adapter_name: str, window: NoiseWindow) -> None:
    """Switch an adapter off outside a window of λ, and make a plain LoRA a NaRA with C = I.

    Raises:
        ValueError: the adapter has a part in a text encoder, or already a strength over λ; or its
            strength can't depend on λ (see `check_strength`).
    """
    for component, model in models.items():
        configs = adapters_of(model)
        if adapter_name not in configs:
            continue
        if component.startswith(TEXT_ENCODER):
            raise ValueError(
                f"The adapter has a part for {component}, which runs before there is a λ, so a window can't switch it "
                "off. Load the adapter without a window, or a file without that part."
            )
        if strength_of(model, adapter_name) is not None:
            raise ValueError(
                f"The adapter of {component} has a strength over λ already. Load it without a window."
            )
        schedule = within(window)
        check_strength(model, adapter_name, schedule)
        if not isinstance(configs[adapter_name], NaraConfig):
            of_nara = {"core_type": "identity", "core_scale": 0.1, "noise_level_per": None}
            fields = config_to_fields(configs[adapter_name]) | of_nara
            configs[adapter_name] = config_from_fields(fields, "the LoRA")
        give_strength(model, adapter_name, schedule)
