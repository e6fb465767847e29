"""Strictly check the names, shapes, dtypes and values of an adapter's tensors.

PEFT, Diffusers and Transformers ignore tensors with unexpected names, at most with a warning, and
leave the layers at random values. In this package, a file is loaded completely or not at all.
`check_tensors` compares the file with the adapter before loading. `check_loaded` compares them
after loading, and works for adapters of any method.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import cast

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from nara_diffusion.cores.core_set import is_core_key
from nara_diffusion.utils.wording import listed

PEFT_PREFIX = "base_model.model."
"""The prefix of every module name in PEFT's files."""

_HINT = (
    "Was it trained on another base model, or saved with another core_type, core_sharing, "
    "noise_embedding, rank or target_modules?"
)


def check_tensors(
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    in_model: Mapping[str, Tensor] | None = None,
) -> None:
    """Compare a file's tensors with those of the adapter that it is loaded into.

    Both use the model's names. A missing core is an error and never stays at random values.

    Args:
        tensors: the file's tensors.
        expected: the adapter's tensors. Their values are not read, so they may be on "meta".
        in_model: all tensors of the model, if the file may also contain embeddings and
            `modules_to_save`. None means `expected`.

    Raises:
        ValueError: a tensor is missing, unknown or not finite, has a wrong shape, contains integers
            although the model has real numbers, or belongs to a core and is not float32.
    """
    in_model = expected if in_model is None else in_model
    if missing := [key for key in expected if key not in tensors]:
        raise ValueError(f"The checkpoint lacks {listed(missing, 'tensors')}. {_HINT}")
    if unknown := [key for key in tensors if key not in in_model]:
        raise ValueError(
            f"The checkpoint has {listed(unknown, 'tensors')}, but this adapter does not. {_HINT}"
        )
    for key, tensor in tensors.items():
        _check_tensor(key, tensor, in_model[key], has_shape=key in expected)


def _check_tensor(key: str, tensor: Tensor, like: Tensor, has_shape: bool) -> None:
    """Compare one tensor of a file with the model's, including shapes if `has_shape`."""
    dtype = getattr(tensor, "dtype", None)  # a user's dict may hold anything
    if dtype is None or dtype.is_complex or dtype.is_floating_point != like.is_floating_point():
        raise ValueError(
            f"'{key}' is {dtype or type(tensor).__name__} in the checkpoint, but {like.dtype} in the "
            "model: save it again without converting or quantising it."
        )
    if has_shape and tensor.shape != like.shape:
        raise ValueError(
            f"'{key}' has shape {tuple(tensor.shape)} in the checkpoint, but this adapter needs "
            f"{tuple(like.shape)}. {_HINT} An adapter is loaded completely or not at all, even "
            "with ignore_mismatched_sizes=True."
        )
    if is_core_key(key):
        check_core_precision(
            key, tensor, like, "in the checkpoint", "save it again without converting it"
        )
    check_finite(key, tensor, like.dtype)


def check_finite(key: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError if a tensor has a value that is not finite in `dtype`."""
    if tensor.is_floating_point() and not bool(tensor.to(dtype).isfinite().all()):
        raise ValueError(
            f"'{key}' has NaN or infinity in the checkpoint, or a value that is too large for its "
            "layer. Either its training diverged, or the model must be in bfloat16 or float32."
        )


def check_core_precision(key: str, tensor: Tensor, like: Tensor, where: str, remedy: str) -> None:
    """Raise ValueError if a core's tensor is not float32, or if its integers have another dtype.

    Converting a rounded tensor back to float32 would not restore its values.
    """
    expected = torch.float32 if like.is_floating_point() else like.dtype
    if tensor.dtype != expected:
        raise ValueError(
            f"'{key}' is {tensor.dtype} {where}, but a core is kept in float32, since rounding "
            f"changes C(λ) − I by several per cent: {remedy}."
        )


def check_loaded(
    model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor], origin: str
) -> None:
    """Compare an adapter in `model` with the `tensors` of the file that it was loaded from.

    Args:
        model: a PeftModel, or a model with adapters from `inject_adapter_in_model`.
        tensors: the file's tensors under PEFT's names, with or without its prefix.
        origin: the name of the file in error messages.

    Raises:
        ValueError: a tensor is not in the model, or the model has one that is not in the file.
    """
    loaded = _by_plain_name(adapter_tensors(model, adapter_name))
    in_file = _by_plain_name(tensors)
    lost = [key for key, tensor in in_file.items() if not _has_values(loaded.get(key), tensor)]
    surplus = [key for key in loaded if key not in in_file]
    if lost or surplus:
        raise ValueError(
            f"{len(lost)} of the {len(in_file)} tensors of {origin} did not load into {type(model).__name__}, and "
            f"{len(surplus)} others are not in the file: {listed([*lost, *surplus])}. The installed PEFT, Diffusers "
            "and Transformers expect other names, or another configuration, for this model: save the "
            "adapter again with these versions, or load it into the model that it was trained on."
        )


def adapter_tensors(
    model: nn.Module, adapter_name: str, *, keep_vars: bool = False
) -> dict[str, Tensor]:
    """Return the adapter's tensors in `model` that PEFT would save, without base weights.

    Args:
        keep_vars: whether to return the parameters themselves, as in `Module.state_dict`.
    """
    with beside_configuration():
        return get_peft_model_state_dict(
            cast(PeftModel, model),  # PEFT reads any model with a `peft_config`
            model.state_dict(keep_vars=keep_vars),
            adapter_name=adapter_name,
            save_embedding_layers=False,
        )


_configuration_is_kept: ContextVar[bool] = ContextVar("nara_configuration_is_kept", default=False)


@contextmanager
def beside_configuration() -> Iterator[None]:
    """Make `check_keeps_configuration` accept any model, since the caller saves the configuration."""
    token = _configuration_is_kept.set(True)
    try:
        yield
    finally:
        _configuration_is_kept.reset(token)


def check_keeps_configuration(model: nn.Module, adapter_name: str) -> None:
    """Raise ValueError if the tensors of a NaRA are collected from a Diffusers model.

    `save_lora_weights` and `save_lora_adapter` in Diffusers do not write the configuration that is
    needed to load a NaRA.
    """
    original = type(model._modules.get("_orig_mod", model))
    is_of_diffusers = any(kind.__name__ == "ModelMixin" for kind in original.__mro__)
    if is_of_diffusers and not _configuration_is_kept.get():
        raise ValueError(
            f"Adapter '{adapter_name}' is a NaRA, which save_lora_weights and save_lora_adapter would "
            "write without the configuration that loading needs. Call "
            "pipe.save_nara_weights(folder) or, in a training script, "
            "checkpoint_nara_weights(accelerator, unet=unet) (docs/other_trainers.md)."
        )


def _by_plain_name(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under their names in the model, without PEFT's prefix and suffix."""
    return {
        key.removeprefix(PEFT_PREFIX).removesuffix(".weight"): tensor
        for key, tensor in tensors.items()
    }


def _has_values(loaded: Tensor | None, saved: Tensor) -> bool:
    """Return True if the model's tensor has the file's values, or its shape if it is on "meta"."""
    if loaded is None or loaded.shape != saved.shape:
        return False
    expected = saved.to(loaded.device, loaded.dtype)
    # a tensor on "meta" is offloaded to disk
    return loaded.is_meta or torch.allclose(loaded, expected, rtol=0, atol=0, equal_nan=True)
