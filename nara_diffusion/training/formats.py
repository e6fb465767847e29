"""The files of a language model's fine-tuning, for users and for checkpoints.

an adapter         adapter_config.json, adapter_model.safetensors: PEFT's format, for PeftModel.from_pretrained
all weights        config.json, model.safetensors: transformers' format, for load_backbone
in a checkpoint    the same, and trainable.safetensors where PEFT's format leaves out what training goes on with:
                   AdaLoRA's dropped directions and their importance, and the network that makes P-tuning's tokens
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from peft.utils.warning import PeftWarning
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nara_diffusion.loaders.file import load_whole_model
from nara_diffusion.loaders.strict import check_loaded
from nara_diffusion.training.adapters.adalora import adalora_models, allocator_state, load_allocator_state
from nara_diffusion.training.adapters.pissa import as_lora, changes_base

ADAPTER_WEIGHTS = "adapter_model.safetensors"
TRAINABLE = "trainable.safetensors"

AdapterWriter = Callable[[Any, Path, dict[str, Any]], None]
"""Writes an adapter's files: (the model without wrappers, the folder, the model's whole state dict)."""


def write_adapter(model: Any, folder: Path, state: dict[str, Any]) -> None:
    """Write what a user loads onto the base model, or instead of it. It is an `AdapterWriter`."""
    if isinstance(model, PeftModel) and changes_base(model) and hasattr(model, "start_factors"):
        config: Any = model.peft_config["default"]
        tensors = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
        write_converted(*as_lora(model, config, tensors), folder)
    else:
        _write_as_it_is(model, folder, state)


def write_checkpoint(model: Any, folder: Path, state: dict[str, Any]) -> None:
    """Write what `load_checkpoint` reads. It is an `AdapterWriter`."""
    _write_as_it_is(model, folder, state)
    if not has_exact_format(model):
        write_trainable(model, folder, state)


def load_checkpoint(model: Any, checkpoint: Path) -> None:
    """Load the weights of a checkpoint into `model`, before accelerate wraps it."""
    if (checkpoint / TRAINABLE).is_file():
        read_trainable(model, checkpoint)
    elif isinstance(model, PeftModel):
        tensors = load_peft_weights(str(checkpoint), device="cpu")
        set_peft_model_state_dict(model, tensors)
        check_loaded(model, "default", tensors, str(checkpoint))
    else:
        read_all_weights(model, checkpoint)


def has_exact_format(model: Any) -> bool:
    """Whether PEFT's format, or transformers', holds all that training goes on with."""
    config = getattr(model, "peft_config", {}).get("default")
    return config is None or not (config.is_prompt_learning or adalora_models(model))


def write_trainable(model: nn.Module, folder: Path, state: dict[str, Any]) -> None:
    """trainable.safetensors: the trainable parameters by their names in `model`, and AdaLoRA's importance of them."""
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    tensors = {name: value for name, value in state.items() if name in names} | allocator_state(adalora_models(model))
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, folder / TRAINABLE)


def read_trainable(model: nn.Module, folder: Path) -> None:
    """Load what `write_trainable` wrote into `model`.

    Raises:
        ValueError: the file has other tensors than `model` trains.
    """
    tensors = load_file(folder / TRAINABLE)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    stored = {name: value for name, value in tensors.items() if not name.startswith("allocator.")}
    if {name: value.shape for name, value in stored.items()} != {name: p.shape for name, p in trainable.items()}:
        raise ValueError(
            f"{folder / TRAINABLE} holds {len(stored)} tensors, which aren't the {len(trainable)} trained ones of this "
            "run: was it written with another adapter, rank or target_modules?"
        )
    for name, parameter in trainable.items():
        parameter.data.copy_(stored[name])
    load_allocator_state(adalora_models(model), tensors)


def read_all_weights(model: Any, folder: Path) -> None:
    """Copy the weights of the model in `folder`, of `model`'s class, into `model`. Raises as `load_whole_model`."""
    saved = load_whole_model(type(model), folder, dtype=model.dtype)
    model.load_state_dict(saved.state_dict())


def write_converted(config: LoraConfig, tensors: dict[str, Tensor], folder: Path) -> None:
    """Write an adapter in PEFT's format, from its configuration and tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    config = copy(config)
    config.inference_mode = True
    config.save_pretrained(str(folder))
    content = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(content, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def write_peft_adapter(model: PeftModel, folder: Path, state: dict[str, Any] | None = None) -> None:
    """adapter_config.json and adapter_model.safetensors."""
    with warnings.catch_warnings():
        # AdaLoRA may drop all directions of a layer, which PEFT takes for the mark of a sharded model
        warnings.filterwarnings("ignore", message=".*have invalid shape", category=PeftWarning)
        # embeddings are the base model's; PEFT would look its configuration up again to find that out
        model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; the run writes its own


def _write_as_it_is(model: Any, folder: Path, state: dict[str, Any]) -> None:
    if isinstance(model, PeftModel):
        write_peft_adapter(model, folder, state)
    else:
        model.save_pretrained(str(folder), state_dict=state)
