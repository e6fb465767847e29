"""Write and load the weights of a fine-tuned language model.

an adapter         adapter_config.json, adapter_model.safetensors: PEFT's format, for PeftModel
all weights        config.json, model.safetensors: transformers' format, for load_backbone
in a checkpoint    the same files; for virtual tokens also trainable.safetensors, with the weights
                   of P-tuning's network, which computes the tokens
"""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from nara_diffusion.loaders.tensor_files import load_whole_model
from nara_diffusion.strict import check_loaded, check_tensors

TRAINABLE = "trainable.safetensors"


def write_adapter(
    model: PeftModel | PreTrainedModel, folder: Path, state: dict[str, Tensor]
) -> None:
    """Write the adapter, or the whole model, as users load it. A `checkpoints.Writer`."""
    if isinstance(model, PeftModel):
        # the embeddings belong to the base model; PEFT would reload its configuration to check
        model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; the run writes its own
    else:
        model.save_pretrained(str(folder), state_dict=state)


def write_checkpoint(
    model: PeftModel | PreTrainedModel, folder: Path, state: dict[str, Tensor]
) -> None:
    """Write the files that `load_checkpoint` reads. A `checkpoints.Writer`."""
    write_adapter(model, folder, state)
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        tensors = {name: state[name].detach().cpu().contiguous() for name in _trainable(model)}
        save_file(tensors, folder / TRAINABLE)


def load_checkpoint(model: nn.Module, checkpoint: Path) -> None:
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
        assert isinstance(model, PreTrainedModel)
        loaded = load_whole_model(type(model), checkpoint, dtype=model.dtype)
        model.load_state_dict(loaded.state_dict())


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
