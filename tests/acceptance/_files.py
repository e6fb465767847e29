"""The adapters in files/, what is read from them, and how they are compared."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.helpers.rounding import assert_near as assert_near

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
FILES = Path(__file__).with_name("files")
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PIPELINE_WEIGHTS = "pytorch_nara_weights.safetensors"
METADATA = "nara_adapter_metadata"
FOLD_LEVEL = 0.375
"""λ of the stored exports."""


def expected(kind: str) -> dict[str, Tensor]:
    """The stored outputs of files/`kind`."""
    return load_file(FILES / kind / "outputs.safetensors")


def header(path: Path) -> dict[str, Any]:
    """The metadata of a safetensors file; JSON in it is read."""
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata() or {})
    return {key: json.loads(value) if value.startswith("{") else value for key, value in metadata.items()}


def unet_folder(folder: Path) -> Path:
    """Copy the PEFT folder of a UNet's NaRA to `folder`, without the scheduler, which no version after 0.2 reads."""
    shutil.copytree(FILES / "peft" / "converted", folder)
    fields = json.loads((folder / PEFT_CONFIG).read_text())
    del fields["scheduler"]
    (folder / PEFT_CONFIG).write_text(json.dumps(fields))
    return folder


def layers_of(tensors: Mapping[str, Tensor], component: str = "") -> set[str]:
    """The modules for which a file has factors."""
    names = {key.partition(".lora_")[0] for key in tensors if ".lora_" in key}
    return {name.removeprefix(component) for name in names if name.startswith(component)}


def adapted_layers(model: nn.Module, adapter_name: str = "default") -> set[str]:
    """The modules of a model that have factors."""
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in {*module.lora_A, *module.lora_embedding_A}
    }


def assert_same_tensors(actual: Path, wanted: Path, tolerance: float = 0) -> None:
    """The same keys, dtypes and shapes, and values, to a share of each tensor's largest."""
    tensors, stored = load_file(actual), load_file(wanted)
    assert tensors.keys() == stored.keys()
    for key, tensor in stored.items():
        limit = tolerance * tensor.abs().max().item()
        torch.testing.assert_close(tensors[key], tensor, rtol=0, atol=limit, msg=lambda text, key=key: f"{key}: {text}")


def assert_same_fields(actual: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """The fields of a configuration that both have are the same; versions may add some or leave some out."""

    def value(fields: Mapping[str, Any], key: str) -> Any:
        of_file = fields[key]
        return (
            sorted(of_file) if key == "target_modules" and isinstance(of_file, list) else of_file
        )  # PEFT has a set of it

    unlike = {key for key in actual.keys() & wanted.keys() if value(actual, key) != value(wanted, key)}
    assert unlike <= {"peft_version"}, {key: (actual[key], wanted[key]) for key in unlike}


def parts_of(model: Any) -> dict[str, nn.Module]:
    if isinstance(model, nn.Module):
        return {"model": model}
    parts = {name: getattr(model, name, None) for name in ("unet", "transformer", "text_encoder", "text_encoder_2")}
    return {name: part for name, part in parts.items() if part is not None}


def state(model: Any) -> dict[str, Any]:
    """What a load could change."""
    parts: dict[str, Any] = {} if isinstance(model, nn.Module) else {"scheduler": id(model.scheduler)}
    for name, part in parts_of(model).items():
        modules = dict(part.named_modules())
        parts |= {
            f"{name}: modules": [(n, type(m), m.training) for n, m in modules.items()],
            f"{name}: hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules.values()],
            f"{name}: trained": {n for n, p in part.named_parameters() if p.requires_grad},
            f"{name}: adapters": dict(getattr(part, "peft_config", None) or {}),
            f"{name}: attributes": set(vars(part)),
            f"{name}: values": {n: tensor.numpy().tobytes() for n, tensor in part.state_dict().items()},
        }
    return parts


def refused(call: Callable[[], Any], model: Any, *parts: str) -> None:
    """`call` raises ValueError whose message has these parts, and leaves `model` as it was."""
    original = state(model)
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the parts are matched below)
        call()
    assert all(part in str(caught.value) for part in parts), (parts, str(caught.value))
    assert state(model) == original


@cache
def installed_command() -> Callable[[list[str]], None]:
    """The function that is installed as the command `nara`."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    module, _, function = scripts["nara"].partition(":")
    return getattr(import_module(module), function)


def nara(*words: Any) -> None:
    """Call the command `nara` with these words."""
    installed_command()([str(word) for word in words])
