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
from nara_diffusion.loaders.strict import check_loaded, check_tensors

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
        tensors = {name: state[name].detach().cpu().contiguous() for name in _trainable(model)}
        save_file(tensors, folder / TRAINABLE)


def load_checkpoint(model: Any, checkpoint: Path) -> None:
    """Load the weights of a checkpoint into `model`, before accelerate wraps it."""
    if (checkpoint / TRAINABLE).is_file():
        tensors, trainable = load_file(checkpoint / TRAINABLE), _trainable(model)
        check_tensors(tensors, trainable)
        for name, parameter in trainable.items():
            parameter.data.copy_(tensors[name])
    elif isinstance(model, PeftModel):
        tensors = load_peft_weights(str(checkpoint), device="cpu")
        set_peft_model_state_dict(model, tensors)
        check_loaded(model, "default", tensors, str(checkpoint))
    else:
        model.load_state_dict(load_whole_model(type(model), checkpoint, dtype=model.dtype).state_dict())


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
