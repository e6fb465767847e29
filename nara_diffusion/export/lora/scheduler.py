"""The scheduler that a LoRA needs, if it was trained to predict something else than its base (`NaraConfig.scheduler`).

    a folder               scheduler/scheduler_config.json, as Diffusers writes a scheduler and reads it
    a safetensors file     __metadata__["nara_scheduler"], its fields as JSON

`from_lora` reads both. No host sets a scheduler by a LoRA, so who makes one is told which scheduler it needs.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nara_diffusion.config import read_config_file
from nara_diffusion.noise.schedulers.prediction import FLOW, how_to_set, prediction_in

logger = logging.getLogger(__name__)

SCHEDULER = "scheduler"
"""The name of the folder."""
SCHEDULER_KEY = "nara_scheduler"
_FILE = "scheduler_config.json"
_NODE = "ModelSamplingDiscrete"
_SAMPLINGS = {"epsilon": "eps", "v_prediction": "v_prediction", "sample": "x0"}
"""{kind of prediction: ComfyUI's name of it}."""


def flow_shift(fields: Mapping[str, Any]) -> float | None:
    """The shift of σ of a rectified flow; None if it isn't one."""
    prediction = prediction_in(fields)
    if prediction is None or prediction.kind != FLOW:
        return None
    return float(fields.get("flow_shift") or fields.get("shift") or 1.0)


def comfyui_node(fields: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """ComfyUI's node that makes a model sample so, and its inputs beside the model; None if none is known."""
    shift, prediction = flow_shift(fields), prediction_in(fields)
    if shift is not None:
        return "ModelSamplingSD3", {"shift": shift}
    if prediction is None or prediction.path == "rectified flow":
        return None
    return _NODE, {"sampling": _SAMPLINGS[prediction.kind], "zsnr": prediction.path == "zero terminal SNR"}


def comfyui_words(fields: Mapping[str, Any]) -> str:
    """`comfyui_node` in words; empty if none is known."""
    node = comfyui_node(fields)
    if node is None:
        return ""
    return f"the node {node[0]} ({', '.join(f'{name} {value}' for name, value in node[1].items())})"


def warn_of_scheduler(fields: Mapping[str, Any] | None) -> None:
    """Log which scheduler a LoRA needs, and how it is set; nothing without `fields`."""
    if fields is None:
        return
    told = [f"in Diffusers, {how_to_set(fields)}"]
    if words := comfyui_words(fields):
        told.append(f"in ComfyUI, {words}")
    logger.warning(
        "The LoRA predicts %s, which its base doesn't, and no program sets a scheduler by a LoRA: with the base's own "
        "it samples noise. Set it: %s.",
        prediction_in(fields) or f"what {fields['_class_name']} expects",
        "; ".join(told),
    )


def write_scheduler(fields: Mapping[str, Any] | None, folder: Path) -> None:
    """Write the folder of the scheduler into `folder`; nothing without `fields`."""
    if fields is not None:
        (folder / SCHEDULER).mkdir()
        (folder / SCHEDULER / _FILE).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_scheduler(folder: Path, metadata: Mapping[str, str] | None, origin: str) -> dict[str, Any] | None:
    """The scheduler's fields in a file's `metadata`, or else in its `folder`; None if there are none.

    Raises:
        ValueError: they are no JSON object. `origin` names the file.
    """
    text, path = (metadata or {}).get(SCHEDULER_KEY), folder / SCHEDULER / _FILE
    if text is not None:
        return json.loads(text)
    if not path.is_file():
        return None
    fields = read_config_file(path)
    return {name: value for name, value in fields.items() if name not in ("_diffusers_version", "_use_default_values")}
