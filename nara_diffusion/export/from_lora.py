"""Create a NaRA that starts as a given LoRA, with its A, B and magnitudes, and C(λ) = I."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from diffusers.loaders.peft import PeftAdapterMixin
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from nara_diffusion.config import NaraConfig, changes_base
from nara_diffusion.loaders.components import TEXT_ENCODER, follow_scheduler
from nara_diffusion.loaders.file import naming
from nara_diffusion.loaders.insertion import LOADED_FLAG
from nara_diffusion.strict import adapter_tensors, check_tensors
from nara_diffusion.tuner.adding import restored_on_error
from nara_diffusion.tuner.strength import layers_of
from nara_diffusion.tuner.twins import with_equal_twins
from nara_diffusion.utils.wording import listed

from .adapter_factors import adapter_of_model
from .plain_lora import PlainLora
from .read_lora import is_pipeline, read_lora

_DECIDED = {
    "r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
    "lora_bias", "fan_in_fan_out", "layers_to_transform", "layers_pattern", "modules_to_save", "strength",
}  # fmt: skip
"""Fields of NaraConfig that come from the LoRA, or would make the NaRA start as something else."""


def from_lora(
    lora: str | os.PathLike[str], model: Any, adapter_name: str = "default", **core: Any
) -> Any:
    """Add a NaRA that equals the given LoRA or DoRA at step 0, with the same tensors and C(λ) = I.

        model = from_lora("folder of a PEFT LoRA", backbone, core_type="hypernetwork")
        from_lora("pytorch_lora_weights.safetensors", pipe)              # then pipe.save_nara_weights(…)

    Args:
        lora: a folder in PEFT's format, written by `save_pretrained` of a PeftModel or of
            `to_lora(…)`. For a pipeline, it may also be a file that Diffusers reads (with
            Diffusers' names, kohya's, …), or a folder with such a file.
        model: the base. A module is wrapped in a PeftModel. In a Diffusers model or pipeline, the
            adapter is injected; a pipeline's text encoders get plain LoRAs (core_type "identity").
        adapter_name: the name of the new adapter.
        core: fields of NaraConfig, such as core_type, core_sharing, noise_convention, lora_dropout.

    Returns:
        A PeftModel, or the Diffusers model or pipeline itself. The adapter is active and trainable.

    Raises:
        ValueError: `lora` can't be read as a LoRA, or has trained biases, tokens or modules; a
            layer of `lora` is missing from `model` or has another shape there; `core` sets a field
            that comes from the LoRA, or a core that doesn't start at C = I (core_init "kaiming",
            core_type "rank_mask" or "bins"). `model` is then unchanged.
    """
    decided = sorted(_DECIDED & core.keys())
    if decided:
        raise ValueError(
            f"{', '.join(decided)} can't be given, since the LoRA determines them. Leave them out."
        )
    origin = f"'{lora}'"
    with naming(lora):
        parts = read_lora(lora, model)
    if not is_pipeline(model):
        with restored_on_error(model):
            inject = isinstance(model, PeftAdapterMixin)
            return _insert(parts[""], model, adapter_name, core, origin, inject)
    targets = {component: getattr(model, component) for component in parts}
    with restored_on_error(*targets.values()):
        for component, part in parts.items():
            options = {"core_type": "identity"} if component.startswith(TEXT_ENCODER) else core
            _insert(part, targets[component], adapter_name, options, origin, inject=True)
        follow_scheduler(model)
    return model


def _insert(
    lora: PlainLora,
    model: Any,
    name: str,
    core: Mapping[str, Any],
    origin: str,
    inject: bool,
) -> Any:
    """Add the adapter to `model`, and return the adapted model.

    Args:
        inject: whether to inject the adapter without wrapping the model in a PeftModel.
    """
    root = model.get_base_model() if isinstance(model, PeftModel) else model
    if name in getattr(root, "peft_config", {}):
        raise ValueError(
            f"{type(root).__name__} already has an adapter '{name}'. Choose another adapter_name."
        )
    names = {field.name for field in fields(LoraConfig) if field.init}
    names -= {"peft_type", "auto_mapping", "inference_mode"}
    values = {name: copy.copy(getattr(lora.config, name)) for name in names}
    if not changes_base(values["init_lora_weights"]):
        values["init_lora_weights"] = True  # the LoRA's tensors replace these values
    config = NaraConfig(**values | dict(core))
    with warnings.catch_warnings():
        # several adapters are intended
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
        elif inject:
            inject_adapter_in_model(config, model, name)
        else:
            model = get_peft_model(model, config, name)
    copy_tensors(lora, root, name, origin)
    check_identity(root, name, config)
    if inject:
        setattr(root, LOADED_FLAG, True)
    elif isinstance(model, PeftModel):
        model.set_adapter(name)
    return model


def copy_tensors(lora: PlainLora, root: nn.Module, adapter_name: str, origin: str) -> None:
    """Copy A, B and magnitudes of `lora` into an adapter of `root`, all of them or none.

    Cores are unchanged. The copy is exact, because a parameter with a less precise dtype takes the
    dtype of the tensor.

    Args:
        lora: the LoRA.
        root: the adapted model.
        adapter_name: the adapter's name.
        origin: the name of the LoRA in error messages.

    Raises:
        ValueError: the layers, ranks, scales, shapes or kinds of tensors differ.
    """
    scales = {name: (layer.rank, layer.scaling) for name, layer in lora.layers.items()}
    check_scales(scales, root, adapter_name, origin)
    present = adapter_tensors(root, adapter_name, keep_vars=True)
    parameters = {key: parameter for key, parameter in present.items() if ".lora_" in key}
    tensors = lora.state_dict()
    configs: Any = root.peft_config
    if isinstance(configs[adapter_name], NaraConfig):  # a plain LoRA keeps twins apart
        tensors = with_equal_twins(root, tensors, origin)
    for key in parameters.keys() & tensors.keys():
        # files may contain 1 × 1 kernels and magnitudes with or without axes of size 1
        if tensors[key].squeeze().shape == parameters[key].squeeze().shape:
            tensors[key] = tensors[key].reshape(parameters[key].shape)
    try:
        check_tensors(tensors, parameters)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None
    for key, tensor in tensors.items():
        parameter = parameters[key]
        dtype = torch.promote_types(parameter.dtype, tensor.dtype)
        parameter.data = tensor.detach().to(parameter.device, dtype, copy=True)


def check_scales(
    scales: Mapping[str, tuple[int, float]], root: nn.Module, adapter_name: str, origin: str
) -> None:
    """Compare a file's {layer: (rank, scale)} with an adapter of `root`.

    Raises:
        ValueError: the layers differ, or the rank or scale of a layer differs.
    """
    layers: dict[str, Any] = layers_of(root, adapter_name)
    different = sorted(scales.keys() ^ layers.keys())
    if different:
        raise ValueError(
            f"{origin} has {len(scales)} layers and the adapter '{adapter_name}' has {len(layers)}. Only one of the "
            f"two has {listed(different)}. Was it trained on this base model? For training, set target_modules to the "
            "layers of the file."
        )
    for name, (rank, scaling) in scales.items():
        own_rank, own_scaling = layers[name].r[adapter_name], layers[name].scaling[adapter_name]
        if own_rank != rank or not math.isclose(own_scaling, scaling, rel_tol=1e-6):
            raise ValueError(
                f"{origin} has rank {rank} and scale {scaling:g} in '{name}', but the adapter has {own_rank} and "
                f"{own_scaling:g}. Set r (--rank) to {rank}, lora_alpha to {scaling * rank:g} and use_rslora to False; "
                "if layers differ, also rank_pattern and alpha_pattern."
            )


def check_identity(root: nn.Module, adapter_name: str, config: NaraConfig) -> None:
    """Raise ValueError if the adapter's C(λ) is not I."""
    level = torch.tensor([0.0, 0.2, 0.5, 0.7, 1.0])
    with adapter_of_model(root, adapter_name) as adapter:
        for core in adapter.cores(level).values():
            if not torch.equal(core, torch.eye(core.shape[-1]).expand_as(core)):
                raise ValueError(
                    f"core_type {config.core_type!r} (core_init {config.core_init!r}) doesn't start at C = I, so the "
                    'NaRA would not start as the LoRA. Choose core_type "hypernetwork", "constant" or "knots" with '
                    'core_init "zero_last", or core_type "identity".'
                )
