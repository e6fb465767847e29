"""The files of an image model's fine-tuning, how a user's pipeline reads them, and checkpoints.

    NaRA's family           pytorch_nara_weights.safetensors     pipe.load_nara_weights(folder)
    lora, dora, rslora,     pytorch_lora_weights.safetensors     pipe.load_lora_weights(folder)
      pissa
    other adapters of PEFT  COMPONENT/adapter_config.json, …     PeftModel.from_pretrained(pipe.unet, "folder/unet")
    all weights             COMPONENT/config.json, …             type(pipe.unet).from_pretrained("folder/unet")
    of a converted model,   scheduler/scheduler_config.json      type(…).from_pretrained(folder, subfolder="scheduler")
      all but NaRA's family, whose file carries it

A COMPONENT is what was trained, by the pipeline's name: unet or transformer, text_encoder, text_encoder_2. A checkpoint
has the same and, where those files don't hold all that training goes on with, trainable.safetensors: with an average of
the weights too, which is what the files above hold, and ema.safetensors the same by the names of the parameters.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from nara_diffusion import NaraConfig
from nara_diffusion.dreambooth.families.table import family_of
from nara_diffusion.export.lora.scheduler import SCHEDULER
from nara_diffusion.loaders.file import AdapterFile, load_peft_adapter, load_whole_model
from nara_diffusion.loaders.schedulers import build_scheduler
from nara_diffusion.loaders.strict import check_loaded, held_tensors
from nara_diffusion.training.adapters.pissa import as_lora
from nara_diffusion.training.formats import (
    TRAINABLE,
    read_all_weights,
    read_trainable,
    write_peft_adapter,
    write_trainable,
)

from .denoiser import ADAPTER, AdaptedDenoiser

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
_MAGNITUDE = "lora_magnitude_vector"


def write_adapter(model: AdaptedDenoiser, folder: Path, state: dict[str, Any]) -> None:
    """An `AdapterWriter`: what a user loads into a pipeline. The weights are the model's own, or their average."""
    with model.averaged():
        _write_own_weights(model, folder)


def _write_own_weights(model: AdaptedDenoiser, folder: Path) -> None:
    config = model.config
    if isinstance(config, NaraConfig):
        model.pipe.save_nara_weights(folder, adapter_name=ADAPTER)
    elif type(config) is LoraConfig:
        _write_lora(model, folder)
    else:
        for name, component in model.components.items():
            if isinstance(component, PeftModel):
                write_peft_adapter(component, folder / name)
            else:
                component.save_pretrained(str(folder / name))
    if model.scheduler is not None and not isinstance(config, NaraConfig):
        model.scheduler.save_pretrained(folder / SCHEDULER)


def write_checkpoint(model: AdaptedDenoiser, folder: Path, state: dict[str, Any]) -> None:
    """An `AdapterWriter`: what `read_checkpoint` reads."""
    write_adapter(model, folder, state)
    others = model.config is not None and not isinstance(model.config, NaraConfig)
    if others or model.average is not None:
        write_trainable(model, folder, state)
    if model.average is not None:
        model.average.save(folder)


def read_checkpoint(model: AdaptedDenoiser, folder: Path) -> None:
    """Puts what a checkpoint holds into `model`, in float32, before accelerate wraps it."""
    has_trainable = (folder / TRAINABLE).is_file()
    if model.config is None and not has_trainable:
        for name, component in model.components.items():
            read_all_weights(component, folder / name)
    elif not has_trainable or isinstance(model.config, NaraConfig):  # of which the frequencies aren't trained
        for component, part in AdapterFile.read(folder, model.family.denoiser).parts.items():
            adapted = getattr(model, component)
            set_peft_model_state_dict(adapted, part.tensors, adapter_name=ADAPTER)
            check_loaded(adapted, ADAPTER, part.tensors, str(folder))
    if has_trainable:
        read_trainable(model, folder)


@contextmanager
def adapter_loaded(pipe: Any, folder: Path | None) -> Iterator[None]:
    """Inside, `pipe` has what lies in `folder`, loaded as a user loads it; None leaves it the base model."""
    denoiser = family_of(pipe).denoiser
    if folder is None:
        yield
    elif (folder / LORA_WEIGHTS).is_file():
        with _lora_loaded(pipe, folder), _scheduler_set(pipe, folder / SCHEDULER):
            yield
    elif (folder / denoiser).is_dir():
        with _components_loaded(pipe, folder), _scheduler_set(pipe, folder / SCHEDULER):
            yield
    else:
        pipe.load_nara_weights(folder)
        try:
            yield
        finally:
            pipe.unload_nara_weights()


@contextmanager
def _scheduler_set(pipe: Any, folder: Path) -> Iterator[None]:
    """The scheduler of a converted model, if there is one in `folder`."""
    before = pipe.scheduler
    if folder.is_dir():
        pipe.scheduler = build_scheduler(json.loads((folder / "scheduler_config.json").read_text(encoding="utf-8")))
    try:
        yield
    finally:
        pipe.scheduler = before


@contextmanager
def _lora_loaded(pipe: Any, folder: Path) -> Iterator[None]:
    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()  # it warns of each text encoder for which there is nothing in the file
    try:
        pipe.load_lora_weights(folder, adapter_name=ADAPTER)
    finally:
        diffusers_logging.set_verbosity(level)
    try:
        for component, tensors in _by_component(load_file(folder / LORA_WEIGHTS)).items():
            check_loaded(getattr(pipe, component), ADAPTER, tensors, str(folder / LORA_WEIGHTS))
        yield
    finally:
        pipe.unload_lora_weights()


@contextmanager
def _components_loaded(pipe: Any, folder: Path) -> Iterator[None]:
    """Components that were trained whole are exchanged, adapters of PEFT's put into those that are there."""
    family = family_of(pipe)
    before = {name: getattr(pipe, name) for name in (family.denoiser, *family.text_encoders)}
    adapted: list[PeftModel] = []
    try:
        for name, component in before.items():
            if (folder / name / "adapter_config.json").is_file():
                adapted.append(load_peft_adapter(component, folder / name))
            elif (folder / name).is_dir():
                whole = load_whole_model(type(component), folder / name, dtype=component.dtype)
                setattr(pipe, name, whole.to(component.device))
        yield
    finally:
        for model in adapted:
            model.unload()
        for name, component in before.items():
            setattr(pipe, name, component)


def _write_lora(model: AdaptedDenoiser, folder: Path) -> None:
    """Write a LoRA by PEFT's names: of a file that also has Diffusers' older ones, `load_lora_weights` skips a part."""
    layers, metadata = {}, {}
    for name, component in model.components.items():
        config, tensors = as_lora(component, component.peft_config[ADAPTER], _adapter_tensors(component))
        layers[f"{name}_lora_layers"] = tensors if name == model.family.denoiser else _for_transformers(tensors)
        metadata[f"{name}_lora_adapter_metadata"] = config.to_dict()
    type(model.pipe).save_lora_weights(folder, **layers, **metadata)


def _adapter_tensors(component: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in held_tensors(component, ADAPTER).items()}


def _for_transformers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Text encoders are loaded by Transformers, which finds DoRA's magnitudes by the whole name that PEFT shortens."""
    return {f"{key}.weight" if key.endswith(_MAGNITUDE) else key: value for key, value in tensors.items()}


def _by_component(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """unet.….lora_A.weight → {"unet": {"….lora_A.weight": …}}"""
    split: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        component, _, rest = key.partition(".")
        split.setdefault(component, {})[rest] = value
    return split
