"""Reading a LoRA from a folder of PEFT, a file that Diffusers reads, a dict, or a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from peft import LoraConfig, PeftConfig, load_peft_weights
from peft.utils import CONFIG_NAME
from torch import Tensor, nn

from nara_diffusion.loaders.schedulers import DENOISERS
from nara_diffusion.loaders.source import read_file
from nara_diffusion.tuner.config_files import is_naras, read_config_file

from ..adapted_layers import read_adapter
from ..fold import to_lora
from .diffusers_files import read_diffusers
from .plain_lora import PEFT_PREFIX, PlainLora
from .tensors import lora_of_tensors


def read_lora(
    lora: Any, model: Any, *, config: LoraConfig | None = None, source_adapter: str = "default"
) -> tuple[dict[str, PlainLora], str]:
    """{component: LoRA} (an empty name where `model` is no pipeline), and the name of the source in messages.

    Raises:
        ValueError: see `from_lora`.
    """
    if isinstance(lora, PlainLora):
        return _of_denoiser(lora, model), "The LoRA"
    if isinstance(lora, nn.Module):
        return _of_denoiser(_of_model(lora, source_adapter), model), f"The LoRA of {type(lora).__name__}"
    if isinstance(lora, Mapping):
        if config is not None:
            return _of_denoiser(lora_of_tensors(config, _without_prefix(lora), "The dict"), model), "The dict"
        if any(key.startswith(PEFT_PREFIX) for key in lora):
            raise ValueError("The dict has PEFT's names, but no tensor tells α: pass config=, its LoraConfig.")
        return read_diffusers(lora, None, model, "The dict"), "The dict"
    if not isinstance(lora, (str, os.PathLike)):
        raise ValueError(f"lora is a {type(lora).__name__}: pass a path, a dict of tensors, a model or a PlainLora.")
    path = Path(lora).expanduser()
    if (path / CONFIG_NAME).is_file():
        return _of_denoiser(_of_folder(path), model), f"'{path}'"
    file = _file(path)
    tensors, metadata = read_file(file)
    return read_diffusers(tensors, metadata, model, f"'{file}'"), f"'{file}'"


def _of_denoiser(lora: PlainLora, model: Any) -> dict[str, PlainLora]:
    if not isinstance(model, DiffusionPipeline):
        return {"": lora}
    names = [name for name in DENOISERS if isinstance(getattr(model, name, None), nn.Module)]
    if not names:
        raise ValueError(f"{type(model).__name__} has none of {', '.join(DENOISERS)}: pass the module that is meant.")
    return {names[0]: lora}


def _of_model(model: nn.Module, adapter_name: str) -> PlainLora:
    with read_adapter(model, adapter_name) as adapter:
        if any(layer.key is not None for layer in adapter.layers):
            raise ValueError(
                f"Adapter '{adapter_name}' has cores, or a strength that depends on λ: it is a NaRA already. For the "
                "LoRA of one λ pass to_lora(model, noise_level=λ)."
            )
    return to_lora(model, adapter_name=adapter_name)


def _of_folder(folder: Path) -> PlainLora:
    origin = f"'{folder}'"
    if is_naras(read_config_file(folder / CONFIG_NAME), origin):
        raise ValueError(
            f"{origin} is a NaRA already: load it by PeftModel.from_pretrained(model, folder), or "
            "pipe.load_nara_weights(folder)."
        )
    config = PeftConfig.from_pretrained(str(folder))
    if type(config) is not LoraConfig:
        raise ValueError(f"{origin} is a {type(config).__name__.removesuffix('Config')}, which is no LoRA.")
    return lora_of_tensors(config, _without_prefix(load_peft_weights(str(folder), device="cpu")), origin)


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
        raise ValueError(f"'{path}' has neither {CONFIG_NAME} nor one LoRA file, but {names}: pass the file's path.")
    raise ValueError(
        f"There is no file or folder '{path}'. A LoRA on the Hub is downloaded first: "
        "huggingface_hub.snapshot_download(repository)."
    )
