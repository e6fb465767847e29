"""The files of a language model's fine-tuning, for users and for checkpoints.

an adapter         adapter_config.json, adapter_model.safetensors: PEFT's format, for PeftModel.from_pretrained
all weights        config.json, model.safetensors: transformers' format, for load_backbone
in a checkpoint    the same, and for virtual tokens trainable.safetensors: the network that makes P-tuning's
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from nara_diffusion.loaders.file import load_whole_model
from nara_diffusion.loaders.strict import check_loaded

TRAINABLE = "trainable.safetensors"


def write_adapter(model: Any, folder: Path, state: dict[str, Any]) -> None:
    """Write what a user loads onto the base model, or instead of it. It is a `checkpoints.Writer`."""
    if isinstance(model, PeftModel):
        # embeddings are the base model's; PEFT would look its configuration up again to find that out
        model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; the run writes its own
    else:
        model.save_pretrained(str(folder), state_dict=state)


def write_checkpoint(model: Any, folder: Path, state: dict[str, Any]) -> None:
    """Write what `load_checkpoint` reads. It is a `checkpoints.Writer`."""
    write_adapter(model, folder, state)
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
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


def write_trainable(model: nn.Module, folder: Path, state: dict[str, Any]) -> None:
    """trainable.safetensors: the trainable parameters by their names in `model`."""
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items() if name in names}
    save_file(tensors, folder / TRAINABLE)


def read_trainable(model: nn.Module, folder: Path) -> None:
    """Load what `write_trainable` wrote into `model`.

    Raises:
        ValueError: the file has other tensors than `model` trains.
    """
    tensors = load_file(folder / TRAINABLE)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if {name: value.shape for name, value in tensors.items()} != {name: p.shape for name, p in trainable.items()}:
        raise ValueError(f"{folder / TRAINABLE} holds other tensors than the {len(trainable)} that this run trains.")
    for name, parameter in trainable.items():
        parameter.data.copy_(tensors[name])


def read_all_weights(model: Any, folder: Path) -> None:
    """Copy the weights of the model in `folder`, of `model`'s class, into `model`. Raises as `load_whole_model`."""
    model.load_state_dict(load_whole_model(type(model), folder, dtype=model.dtype).state_dict())
