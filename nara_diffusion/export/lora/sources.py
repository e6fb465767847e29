"""Reading a LoRA from a folder of PEFT, a file that Diffusers reads, a dict, or a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME
from torch import Tensor, nn

from nara_diffusion.config import is_naras, read_config_file
from nara_diffusion.loaders.file import read_peft_tensors, read_tensors
from nara_diffusion.loaders.schedulers import DENOISERS
from nara_diffusion.loaders.strict import PEFT_PREFIX

from ..adapted_layers import read_adapter
from ..fold import assembled
from .diffusers_files import read_diffusers
from .plain_lora import PlainLora
from .scheduler import read_scheduler
from .tensors import lora_of_tensors


def read_lora(
    lora: Any, model: Any, *, config: LoraConfig | None = None, source_adapter: str = "default"
) -> tuple[dict[str, PlainLora], str]:
    """{component: its LoRA} ({"": the LoRA} if `model` is no pipeline), and the name of the source in messages.

    Raises:
        ValueError: see `from_lora`.
    """
    _check_arguments(lora, model, config, source_adapter)
    if isinstance(lora, PlainLora):
        return _of_denoiser(lora, model), "The LoRA"
    if isinstance(lora, nn.Module):
        return _of_denoiser(_of_model(lora, source_adapter), model), f"The LoRA of {type(lora).__name__}"
    if isinstance(lora, Mapping):
        if config is not None:
            return _of_denoiser(lora_of_tensors(config, _without_prefix(lora), "The dict"), model), "The dict"
        if any(key.startswith(PEFT_PREFIX) for key in lora):
            raise ValueError("The dict has PEFT's keys, but no lora_alpha: pass config=, its LoraConfig.")
        return read_diffusers(lora, None, model, "The dict"), "The dict"
    path = Path(lora).expanduser()
    if (path / CONFIG_NAME).is_file():
        return _of_denoiser(_of_folder(path), model), f"'{path}'"
    file = _file(path)
    tensors, metadata = read_tensors(file)
    scheduler = read_scheduler(file.parent, metadata, f"'{file}'")
    parts = read_diffusers(tensors, metadata, model, f"'{file}'")
    own = {name: part for name, part in parts.items() if name in ("", *DENOISERS)}
    return parts | {name: replace(part, scheduler=scheduler) for name, part in own.items()}, f"'{file}'"


def _check_arguments(lora: Any, model: Any, config: Any, source_adapter: str) -> None:
    kind = type(lora).__name__
    if not isinstance(lora, (PlainLora, nn.Module, Mapping, str, os.PathLike)):
        raise ValueError(f"lora is a {kind}: pass a path, a dict of tensors, a model or a PlainLora.")
    if not isinstance(model, (nn.Module, DiffusionPipeline)):
        raise ValueError(f"model is a {type(model).__name__}: pass a torch.nn.Module or a Diffusers pipeline.")
    if config is not None and not isinstance(config, LoraConfig):
        raise ValueError(f"config is a {type(config).__name__}: pass a LoraConfig.")
    if config is not None and not isinstance(lora, Mapping):
        raise ValueError(f"config is for a dict of tensors, but lora is a {kind}, which has its own: leave it out.")
    if source_adapter != "default" and not isinstance(lora, nn.Module):
        raise ValueError(
            f"source_adapter is {source_adapter!r}, but lora is a {kind}, which has one adapter only: leave it out."
        )
    if isinstance(lora, Mapping):
        _check_tensors(lora)


def _check_tensors(tensors: Mapping[Any, Any]) -> None:
    if not tensors:
        raise ValueError("The dict holds no tensors: pass a LoRA's state dict.")
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise ValueError(
                f"The dict holds {key!r}, which is a {type(tensor).__name__}: pass names and tensors alone."
            )


def _of_denoiser(lora: PlainLora, model: Any) -> dict[str, PlainLora]:
    if not isinstance(model, DiffusionPipeline):
        return {"": lora}
    names = [name for name in DENOISERS if isinstance(getattr(model, name, None), nn.Module)]
    if not names:
        raise ValueError(f"{type(model).__name__} has no {' or '.join(DENOISERS)}: pass the component to adapt.")
    return {names[0]: lora}


def _of_model(model: nn.Module, adapter_name: str) -> PlainLora:
    with read_adapter(model, adapter_name) as adapter:
        if any(layer.key is not None for layer in adapter.layers):
            raise ValueError(
                f"Adapter '{adapter_name}' depends on λ by its core or its strength: it is a NaRA already. For its "
                "LoRA at one λ pass to_lora(model, noise_level=λ)."
            )
        return assembled(adapter, lambda layer: adapter.core(layer, None)[0])


def _of_folder(folder: Path) -> PlainLora:
    origin = f"'{folder}'"
    if is_naras(read_config_file(folder / CONFIG_NAME)):
        raise ValueError(
            f"{origin} is a NaRA already: load it by PeftModel.from_pretrained(model, folder) or "
            "pipe.load_nara_weights(folder)."
        )
    config = PeftConfig.from_pretrained(str(folder))
    if type(config) is not LoraConfig:
        raise ValueError(f"{origin} is a {type(config).__name__.removesuffix('Config')}, which is no LoRA.")
    lora = lora_of_tensors(config, _without_prefix(read_peft_tensors(folder)), origin)
    return replace(lora, scheduler=read_scheduler(folder, None, origin))


def _without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in tensors.items()}


def _file(path: Path) -> Path:
    if path.is_file():
        return path
    found = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    named = path / "pytorch_lora_weights.safetensors"
    if named in found or len(found) == 1:
        return named if named in found else found[0]
    if path.is_dir():
        names = ", ".join(repr(file.name) for file in found[:4]) or "no safetensors file"
        raise ValueError(f"'{path}' has neither {CONFIG_NAME} nor one LoRA file, but {names}: pass the path of a file.")
    raise ValueError(
        f"There is no file or folder '{path}': pass a local path. A LoRA on the Hub is downloaded first, by "
        "huggingface_hub.snapshot_download(repository)."
    )
