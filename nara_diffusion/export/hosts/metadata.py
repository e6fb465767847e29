"""The metadata of a host's file: what its LoRA predicts, where that isn't what its base does.

    nara_scheduler              class and configuration of the scheduler that it needs; `from_lora` reads it
    modelspec.prediction_type   "v" or "epsilon", beside the keys without which there is no ModelSpec
    ss_zero_terminal_snr        "True", as kohya's trainers write it

A rectified flow has no word in ModelSpec (github.com/Stability-AI/ModelSpec), nor has Diffusers' form a key that its
readers know.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nara_diffusion.export.lora.plain_lora import PlainLora
from nara_diffusion.export.lora.scheduler import SCHEDULER_KEY
from nara_diffusion.noise.schedulers.prediction import prediction_in

_WORDS = {"epsilon": "epsilon", "v_prediction": "v"}
_ARCHITECTURES = {"sd15": "stable-diffusion-v1/lora", "sdxl": "stable-diffusion-xl-v1-base/lora"}
"""{base: its name as kohya's trainers write it}."""


def host_metadata(loras: Mapping[str, PlainLora], form: str, base: str, title: str) -> dict[str, str]:
    """The metadata of a file with these LoRAs; `form` and `base` as in `host_state_dict`."""
    fields = next((lora.scheduler for lora in loras.values() if lora.scheduler is not None), None)
    if fields is None:
        return {"format": "pt"}
    found = {"format": "pt", SCHEDULER_KEY: json.dumps(fields, sort_keys=True)}
    return found | (_modelspec(fields, form, base, title) if form != "diffusers" else {})


def _modelspec(fields: Mapping[str, Any], form: str, base: str, title: str) -> dict[str, str]:
    prediction = prediction_in(fields)
    if prediction is None or prediction.path == "rectified flow" or prediction.kind not in _WORDS:
        return {}
    if base not in _ARCHITECTURES:
        return {}
    of_diffusers = base == "sd15" and form == "kohya"  # whose keys are Diffusers' names
    found = {
        "sai_model_spec": "1.0.0",
        "architecture": _ARCHITECTURES[base],
        "implementation": "diffusers" if of_diffusers else "https://github.com/Stability-AI/generative-models",
        "title": title,
        "prediction_type": _WORDS[prediction.kind],
    }
    zero_snr = {"ss_zero_terminal_snr": "True"} if prediction.path == "zero terminal SNR" else {}
    return {f"modelspec.{name}": value for name, value in found.items()} | zero_snr
