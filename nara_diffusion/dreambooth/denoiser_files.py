"""The files of a trained denoiser and its text encoders. Users load them as follows:

    NaRA's family          pytorch_nara_weights.safetensors   pipe.load_nara_weights(folder)
    lora, dora, rslora     pytorch_lora_weights.safetensors   pipe.load_lora_weights(folder)
      of Wan 2.2           one file for each of `EXPERT_LORAS`, as other programs want them
    PEFT's other adapters  COMPONENT/adapter_config.json, …   PeftModel.from_pretrained(
                                                                  pipe.unet, "folder/unet")

COMPONENT is the name of a trained model in the pipeline: unet, transformer, text_encoder, …. A
checkpoint has the same files, and trainable.safetensors, from which training resumes. This file has
the trained weights and the adapters' buffers, by their names in the model.
"""

from __future__ import annotations

import warnings
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
from nara_diffusion.loaders.tensor_files import load_peft_adapter
from nara_diffusion.strict import check_loaded, check_tensors
from nara_diffusion.training.adapter_weights import TRAINABLE

from .denoiser import ADAPTER, AdaptedDenoiser
from .families import HIGH, LOW
from .pipelines import family_of
from .placement import resident

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
EXPERT_LORAS = {
    HIGH: "pytorch_lora_weights_high_noise.safetensors",
    LOW: "pytorch_lora_weights_low_noise.safetensors",
}
"""{denoiser of Wan 2.2: the file of its LoRA, with keys of `transformer`}."""


def write_adapter(model: AdaptedDenoiser, folder: Path, state: dict[str, Any]) -> None:
    """Write the files that a user loads into a pipeline.

    This is a `checkpoints.Writer`; it doesn't need `state`.
    """
    if isinstance(model.config, NaraConfig):
        model.pipe.save_nara_weights(folder, adapter_name=ADAPTER)
        return
    if type(model.config) is LoraConfig:
        _write_lora(model, folder)
    else:
        for name, component in model.components.items():
            component.save_pretrained(str(folder / name))


def _write_lora(model: AdaptedDenoiser, folder: Path) -> None:
    """Write a LoRA by PEFT's names.

    `load_lora_weights` skips a part of a file that also has Diffusers' older names.
    """
    layers, metadata = {}, {}
    for name, component in model.components.items():
        tensors = get_peft_model_state_dict(
            component, adapter_name=ADAPTER, save_embedding_layers=False
        )
        weights = {}
        for key, tensor in tensors.items():
            if key.endswith("_vector") and name not in model.family.trained:
                # Transformers looks up DoRA's magnitudes by the full name, which PEFT shortens
                key += ".weight"
            weights[key] = tensor.detach().cpu().contiguous()
        layers[f"{name}_lora_layers"] = weights
        metadata[f"{name}_lora_adapter_metadata"] = component.peft_config[ADAPTER].to_dict()
    pipeline: Any = type(model.pipe)  # each family's class has LoRA's methods
    if model.family.boundary is None:
        pipeline.save_lora_weights(folder, **layers, **metadata)
        return
    for name in model.family.trained:
        pipeline.save_lora_weights(
            folder,
            layers[f"{name}_lora_layers"],
            weight_name=EXPERT_LORAS[name],
            transformer_lora_adapter_metadata=metadata[f"{name}_lora_adapter_metadata"],
        )


def write_checkpoint(model: AdaptedDenoiser, folder: Path, state: dict[str, Any]) -> None:
    """Write the files that `read_checkpoint` reads.

    This is a `checkpoints.Writer`; it doesn't need `state`.
    """
    write_adapter(model, folder, state)
    tensors = {}
    for name, tensor in _training_state(model).items():
        tensors[name] = tensor.cpu().contiguous()
    save_file(tensors, folder / TRAINABLE)


@torch.no_grad()
def read_checkpoint(model: AdaptedDenoiser, folder: Path) -> None:
    """Load a checkpoint's weights into `model`, before accelerate wraps it."""
    saved, state = load_file(folder / TRAINABLE), _training_state(model)
    check_tensors(saved, state)
    for name, tensor in state.items():
        tensor.copy_(saved[name])


def _training_state(model: AdaptedDenoiser) -> dict[str, Tensor]:
    """Return {name: tensor} of the trained weights and all adapter tensors, to resume from."""
    names = model.trained.keys()
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        is_own = name in names or ADAPTER in name.split(".")
        if is_own and tensor.data_ptr() not in seen:  # VeRA's layers share their projections
            state[name] = tensor
            seen.add(tensor.data_ptr())
    return state


@contextmanager
def adapter_loaded(pipe: Any, folder: Path | None) -> Iterator[None]:
    """Load the adapter in `folder` into `pipe` inside the context, as a user would.

    Args:
        folder: the adapter's folder; None means the base model.

    Raises:
        ValueError: a file in the folder can't be loaded completely.
    """
    if folder is None:
        yield
        return
    family = family_of(pipe)
    with ExitStack() as stack:
        stack.callback(pipe.unload_lora_weights)
        with resident(*(getattr(pipe, name) for name in family.denoisers)):
            loras = [
                name for name in (LORA_WEIGHTS, *EXPERT_LORAS.values()) if (folder / name).is_file()
            ]
            for name in loras:
                _load_lora(pipe, folder / name)
            if not loras and not any((folder / name).is_dir() for name in family.denoisers):
                pipe.load_nara_weights(folder, adapter_name=ADAPTER)
            for name in (*family.denoisers, *family.text_encoders):
                if (folder / name).is_dir():
                    stack.callback(load_peft_adapter(getattr(pipe, name), folder / name).unload)
        yield


def _load_lora(pipe: Any, file: Path) -> None:
    is_low = file.name == EXPERT_LORAS[LOW]
    into = {"load_into_transformer_2": True} if is_low else {}
    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()  # it warns of each text encoder that the file lacks
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            pipe.load_lora_weights(file, adapter_name=ADAPTER, **into)
    finally:
        diffusers_logging.set_verbosity(level)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(file).items():
        component, _, name = key.partition(".")
        parts.setdefault(component, {})[name] = tensor
    for component, tensors in parts.items():
        model = getattr(pipe, LOW if is_low else component)
        check_loaded(model, ADAPTER, tensors, str(file))
