"""Use a NaRA in other training scripts, which have the models of a pipeline but no pipeline.

    nara = checkpoint_nara_weights(accelerator, unet=unet)  # for accelerator.save_state and load_state
    nara.save_nara_weights("outputs")                       # as with a pipeline

docs/other_trainers.md shows how to do this in a training script from Diffusers.
"""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from .components import uncompiled
from .weights import load_nara_weights, save_nara_weights


class PipelineComponents:
    """Some of a pipeline's models under their names, with the pipeline methods for NaRA adapters."""

    hf_device_map = None
    """Read by Diffusers. None: the models are not spread over several devices."""

    def __init__(self, **components: nn.Module) -> None:
        self.components = components
        vars(self).update(components)

    load_nara_weights = load_nara_weights
    save_nara_weights = save_nara_weights


def checkpoint_nara_weights(
    accelerator: Accelerator, *, adapter_name: str = "default", **components: nn.Module
) -> PipelineComponents:
    """Make `accelerator.save_state` and `load_state` save and load only these models' adapter.

        nara = checkpoint_nara_weights(accelerator, unet=unet)  # after unet.add_adapter(NaraConfig(…))

    Each checkpoint then contains a file that `pipe.load_nara_weights` can read.

    Args:
        accelerator: the script's accelerator.
        adapter_name: the name of the adapter that is being trained.
        components: the unwrapped models with adapters, by their names in the pipeline (unet,
            transformer, text_encoder, …).

    Returns:
        An object that holds the models and has the pipeline's methods `save_nara_weights` and
        `load_nara_weights`.

    Raises:
        ValueError: the accelerator uses FSDP or DeepSpeed, which save models themselves.
    """
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            f"The accelerator of checkpoint_nara_weights uses {accelerator.distributed_type.value}, which writes "
            "models itself. Use one process or DDP, or this project's train scripts, which also support sharding."
        )
    adapted = PipelineComponents(**components)
    originals = {id(uncompiled(model)) for model in components.values()}

    def is_adapted(model: nn.Module) -> bool:
        return id(uncompiled(accelerator.unwrap_model(model))) in originals

    def save(models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        adapted.save_nara_weights(folder, adapter_name, is_main_process=accelerator.is_main_process)
        weights[:] = [  # accelerate saves those that remain
            tensors for model, tensors in zip(models, weights, strict=True) if not is_adapted(model)
        ]

    def load(models: list[nn.Module], folder: str) -> None:
        adapted.load_nara_weights(folder, adapter_name, hotswap=True)
        models[:] = [model for model in models if not is_adapted(model)]

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
    return adapted
