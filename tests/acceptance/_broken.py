"""Whole adapter files, ways to break them with what the error has to say, and a call that is to be refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.acceptance import _bases, _files

Tensors = dict[str, Tensor]
Fields = dict[str, Any]
Change = Callable[[Tensors], "tuple[str, ...]"]
"""Breaks the tensors of a file, and returns words that the error has to have."""
GOOD = {"pipeline": _files.FILES / "pipelines" / "sdxl_float32", "peft": _files.FILES / "peft" / "nara"}
WEIGHTS = {"pipeline": _files.PIPELINE_WEIGHTS, "peft": _files.PEFT_WEIGHTS}


def first(tensors: Tensors, part: str) -> str:
    """The first key with `part`, of the denoiser in a pipeline's file."""
    return next(key for key in sorted(tensors) if part in key and not key.startswith("text_encoder"))


def words(key: str) -> tuple[str, ...]:
    """What an error about that tensor has to say: its module and its kind, whatever a model puts between them."""
    key = key.removeprefix("base_model.model.").removeprefix("unet.")
    module, lora, kind = key.partition(".lora_")
    return (module, f"lora_{kind[0]}") if lora else ("core", *key.rsplit(".", 1)[1:])


def drop(part: str) -> Change:
    """All tensors with `part` in their names."""

    def change(tensors: Tensors) -> tuple[str, ...]:
        dropped = [key for key in tensors if part in key]
        named = words(first(tensors, part))
        for key in dropped:
            del tensors[key]
        return named

    return change


def drop_one(part: str) -> Change:
    def change(tensors: Tensors) -> tuple[str, ...]:
        key = first(tensors, part)
        del tensors[key]
        return words(key)

    return change


def drop_layer(tensors: Tensors) -> tuple[str, ...]:
    layer = first(tensors, ".lora_A").partition(".lora_A")[0]
    for kind in "AB":
        del tensors[f"{layer}.lora_{kind}.weight"]
    return words(f"{layer}.lora_A")[:1]


def add(old: str, new: str) -> Change:
    """Another tensor, called like one that is there with `new` in place of `old`."""

    def change(tensors: Tensors) -> tuple[str, ...]:
        key = first(tensors, old)
        other = new.join(key.rsplit(old, 1))
        tensors[other] = tensors[key].clone()
        return words(other)[:1]

    return change


def alter(part: str, change: Callable[[Tensor], Tensor]) -> Change:
    def changed(tensors: Tensors) -> tuple[str, ...]:
        key = first(tensors, part)
        tensors[key] = change(tensors[key]).contiguous()
        return words(key)

    return changed


TENSORS: dict[str, Change] = {
    "one tensor of the core missing": drop("shared.layers.1.weight"),
    "core missing": drop("core"),
    "frequencies missing": drop("freq"),
    "A of a layer missing": drop_one("lora_A"),
    "B of a layer missing": drop_one("lora_B"),
    "layer missing": drop_layer,
    "tensor too many": add("lora_A", "lora_C"),
    "layer too many": add("0.", "7."),
    "A of another width": alter("lora_A", lambda A: torch.cat([A, A[:, :1]], dim=1)),
    "A of another rank": alter("lora_A", lambda A: torch.cat([A, A[:1]])),
    "B of another height": alter("lora_B", lambda B: B[1:]),
    "core of another shape": alter("layers.1.weight", lambda W: W.t()),
    "core in bfloat16": alter("layers.1.weight", lambda W: W.bfloat16()),
    "factor with NaN": alter("lora_B", lambda B: B * torch.nan),
    "factor of integers": alter("lora_A", lambda A: A.int()),
}
FIELDS: dict[str, tuple[Fields, str]] = {
    "core type of a later version": ({"core_type": "splines"}, "splines"),
    "core sharing that the tensors deny": ({"core_sharing": "layer"}, "nara_core"),
    "rank that the tensors deny": ({"r": 5, "rank_pattern": {}}, "rank"),
    "fewer modules than tensors": ({"target_modules": ["v_proj", "to_v"], "alpha_pattern": {}}, "target_modules"),
}
BYTES: dict[str, Callable[[bytes], bytes]] = {
    "cut off": lambda whole: whole[:-9],
    "half": lambda whole: whole[: len(whole) // 2],
    "empty": lambda whole: b"",
}


MAKE: dict[str, Callable[[], Any]] = {"pipeline": _bases.sdxl, "peft": _bases.language_model}


def loading(form: str, model: Any, folder: Path) -> Callable[[], Any]:
    if form == "pipeline":
        return lambda: model.load_nara_weights(folder)
    return lambda: PeftModel.from_pretrained(model, folder)


def parts_of(model: Any) -> dict[str, nn.Module]:
    if isinstance(model, nn.Module):
        return {"model": model}
    parts = {name: getattr(model, name, None) for name in ("unet", "transformer", "text_encoder", "text_encoder_2")}
    return {name: part for name, part in parts.items() if part is not None}


def state(model: Any) -> dict[str, Any]:
    """What a load could change."""
    found: dict[str, Any] = {} if isinstance(model, nn.Module) else {"scheduler": id(model.scheduler)}
    for name, part in parts_of(model).items():
        found[f"{name}: modules"] = {key: (type(module), module.training) for key, module in part.named_modules()}
        found[f"{name}: trainable"] = {key: parameter.requires_grad for key, parameter in part.named_parameters()}
        found[f"{name}: adapters"] = list(getattr(part, "peft_config", {}))
        found[f"{name}: tensors"] = {key: tensor.clone() for key, tensor in part.state_dict().items()}
    return found


def assert_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for key, value in before.items():
        if key.endswith("tensors"):
            torch.testing.assert_close(after[key], value, rtol=0, atol=0)
        else:
            assert after[key] == value, key


def refused(load: Callable[[], Any], model: Any, *parts: str) -> None:
    """The call raises an error with all `parts` and changes nothing of `model`."""
    before = state(model)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        load()
    for part in parts:
        assert part in str(caught.value)
    assert_unchanged(before, state(model))


def copied(form: str, folder: Path) -> Path:
    """A copy of the good file, to be broken; returns the file with the tensors."""
    shutil.copytree(GOOD[form], folder, dirs_exist_ok=True)
    return folder / WEIGHTS[form]


def change_tensors(path: Path, change: Change) -> tuple[str, ...]:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    named = change(tensors)
    save_file(tensors, path, metadata=metadata)
    return named


def change_fields(form: str, path: Path, fields: Fields) -> None:
    if form == "peft":
        config = path.with_name(_files.PEFT_CONFIG)
        config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    else:
        content = _files.header(path)[_files.METADATA]
        content["components"]["unet"] |= fields
        save_file(load_file(path), path, metadata={"format": "pt", _files.METADATA: json.dumps(content)})
