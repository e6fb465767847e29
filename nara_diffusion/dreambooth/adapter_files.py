"""The files of an image model's fine-tuning, how a user's pipeline reads them, and checkpoints.

    NaRA's family           pytorch_nara_weights.safetensors     pipe.load_nara_weights(folder)
    lora, dora, rslora      pytorch_lora_weights.safetensors     pipe.load_lora_weights(folder)
    other adapters of PEFT  COMPONENT/adapter_config.json, …     PeftModel.from_pretrained(pipe.unet, "folder/unet")
    of a converted model,   scheduler/scheduler_config.json      type(…).from_pretrained(folder, subfolder="scheduler")
      all but NaRA's family, whose file carries it

A COMPONENT is what was trained, by its name in the pipeline: unet, transformer, text_encoder, …. A checkpoint has the
same, and, for training to go on, trainable.safetensors, what is trained and the adapters' buffers by their names in the
model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from nara_diffusion import NaraConfig
from nara_diffusion.export.plain_lora import SCHEDULER
from nara_diffusion.loaders.file import load_peft_adapter
from nara_diffusion.loaders.schedulers import build_scheduler
from nara_diffusion.loaders.strict import check_loaded, check_tensors

from .denoiser import ADAPTER, AdaptedDenoiser
from .pipelines import family_of

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
TRAINABLE = "trainable.safetensors"


def write_adapter(model: AdaptedDenoiser, folder: Path, state: dict[str, Any]) -> None:
    """An `AdapterWriter`: what a user loads into a pipeline."""
    if isinstance(model.config, NaraConfig):
        model.pipe.save_nara_weights(folder, adapter_name=ADAPTER)
        return
    if type(model.config) is LoraConfig:
        _write_lora(model, folder)
    else:
        for name, component in model.components.items():
            component.save_pretrained(str(folder / name))
    if model.scheduler is not None:
        model.scheduler.save_pretrained(folder / SCHEDULER)


def _write_lora(model: AdaptedDenoiser, folder: Path) -> None:
    """Write a LoRA by PEFT's names: of a file that also has Diffusers' older ones, `load_lora_weights` skips a part."""
    layers, metadata = {}, {}
    for name, component in model.components.items():
        tensors = get_peft_model_state_dict(component, adapter_name=ADAPTER, save_embedding_layers=False)
        if name != model.family.denoiser:
            # Transformers finds DoRA's magnitudes by the whole name, which PEFT shortens
            tensors = {f"{key}.weight" if key.endswith("_vector") else key: each for key, each in tensors.items()}
        layers[f"{name}_lora_layers"] = {key: each.detach().cpu().contiguous() for key, each in tensors.items()}
        metadata[f"{name}_lora_adapter_metadata"] = component.peft_config[ADAPTER].to_dict()
    type(model.pipe).save_lora_weights(folder, **layers, **metadata)


def write_checkpoint(model: AdaptedDenoiser, folder: Path, state: dict[str, Any]) -> None:
    """An `AdapterWriter`: what `read_checkpoint` reads."""
    write_adapter(model, folder, state)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _training_state(model).items()}
    save_file(tensors, folder / TRAINABLE)


@torch.no_grad()
def read_checkpoint(model: AdaptedDenoiser, folder: Path) -> None:
    """Put what a checkpoint holds into `model`, before accelerate wraps it."""
    given, own = load_file(folder / TRAINABLE), _training_state(model)
    check_tensors(given, own)
    for name, tensor in own.items():
        tensor.copy_(given[name])


def _training_state(model: AdaptedDenoiser) -> dict[str, Tensor]:
    """The model's own tensors that training goes on with, by name: what is trained, and all that an adapter has."""
    names, state, seen = model.trained.keys(), {}, set()
    for name, tensor in model.state_dict().items():
        # VeRA's layers share their projections
        if (name in names or ADAPTER in name.split(".")) and tensor.data_ptr() not in seen:
            state[name] = tensor
            seen.add(tensor.data_ptr())
    return state


@contextmanager
def adapter_loaded(pipe: Any, folder: Path | None) -> Iterator[None]:
    """Inside, `pipe` has what lies in `folder`, loaded as a user loads it; None leaves it the base model. Raises
    ValueError if something in the folder isn't loaded whole."""
    if folder is None:
        yield
        return
    family = family_of(pipe)
    with ExitStack() as stack:
        stack.callback(setattr, pipe, "scheduler", pipe.scheduler)
        if (folder / SCHEDULER).is_dir():
            fields = (folder / SCHEDULER / "scheduler_config.json").read_text(encoding="utf-8")
            pipe.scheduler = build_scheduler(json.loads(fields))
        if (folder / LORA_WEIGHTS).is_file():
            stack.callback(pipe.unload_lora_weights)
            _load_lora(pipe, folder)
        elif not (folder / family.denoiser).is_dir():
            pipe.load_nara_weights(folder)
            stack.callback(pipe.unload_nara_weights)
        for name in (family.denoiser, *family.text_encoders):
            if (folder / name).is_dir():
                stack.callback(load_peft_adapter(getattr(pipe, name), folder / name).unload)
        yield


def _load_lora(pipe: Any, folder: Path) -> None:
    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()  # it warns of each text encoder for which there is nothing in the file
    try:
        pipe.load_lora_weights(folder, adapter_name=ADAPTER)
    finally:
        diffusers_logging.set_verbosity(level)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / LORA_WEIGHTS).items():
        component, _, rest = key.partition(".")
        parts.setdefault(component, {})[rest] = tensor
    for component, tensors in parts.items():
        check_loaded(getattr(pipe, component), ADAPTER, tensors, str(folder / LORA_WEIGHTS))
