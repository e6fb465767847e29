"""Checks of an adapter's tensors: exactly those that the adapter needs, finite, and float32 in the core."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from nara_diffusion.utils.listing import listed

PEFT_PREFIX = "base_model.model."
"""The beginning of each module's name in PEFT's files."""

_HINT = "Was it saved with another core_type, core_sharing, core_input, noise_embedding, rank or target_modules?"


def check_adapter_tensors(
    given: Mapping[str, Tensor], expected: Mapping[str, Tensor], known: Mapping[str, Tensor], core_prefix: str
) -> None:
    """Compare a checkpoint with the adapter that it is loaded into, both under the model's names.

    Args:
        given: the checkpoint's tensors. expected: the adapter's. known: all of the model's, since a checkpoint may
            also hold embeddings and `modules_to_save`.
        core_prefix: how the names of the core's tensors begin, e.g. "nara_core.cores.default.".

    Raises:
        ValueError: a tensor is missing, unknown, misshapen, of integers where the model has real numbers, or not
            finite, or one of the core is not float32. A core that is missing is never replaced by a fresh draw.
    """
    missing = [key for key in expected if key not in given]
    if missing:
        raise ValueError(f"The checkpoint lacks {listed(missing, 'tensors')}. {_HINT}")
    unknown = [key for key in given if key not in known]
    if unknown:
        raise ValueError(
            f"The checkpoint holds {listed(unknown, 'tensors')}, which this adapter does not have. {_HINT}"
        )
    for key, tensor in given.items():
        _check_kind(key, tensor, known[key])
        if key in expected and tensor.shape != expected[key].shape:
            raise ValueError(
                f"'{key}' has shape {tuple(tensor.shape)} in the checkpoint, but this adapter needs "
                f"{tuple(expected[key].shape)}. {_HINT}"
            )
        if core_prefix in key:
            check_core_precision(key, tensor, known[key], "in the checkpoint", "save it again without converting it")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise ValueError(f"'{key}' holds NaN or infinity in the checkpoint: it was saved from a broken run.")


def _check_kind(key: str, tensor: Any, like: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.is_floating_point() != like.is_floating_point() or tensor.is_complex():
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(
            f"'{key}' is {kind} in the checkpoint, where the model has {like.dtype}: save it again without converting "
            "or quantising it."
        )


def check_core_precision(key: str, tensor: Tensor, like: Tensor, where: str, remedy: str) -> None:
    """Raises ValueError if a tensor of a core is not float32 (or, if it holds integers, not of the model's dtype).

    Converting a rounded tensor back to float32 does not restore it.
    """
    if tensor.dtype != (torch.float32 if like.is_floating_point() else like.dtype):
        raise ValueError(
            f"'{key}' is {tensor.dtype} {where}, but a core is kept in float32, since rounding changes "
            f"C(λ) − I by several per cent: {remedy}."
        )


def refuse_name_in_key(key: str, adapter_names: Iterable[str]) -> None:
    """Refuse adapter names that are parts of `key`: PEFT would leave out that tensor when it saves another adapter.

    Raises:
        ValueError: one of `adapter_names` is such a part of `key`.
    """
    for name in set(adapter_names).intersection(key.split(".")):
        raise ValueError(
            f"adapter '{name}' is named like a part of '{key}': beside another adapter it would make PEFT leave "
            "tensors out when saving. Choose another name."
        )


def with_current_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` of a file with the old name of the shared core, `nara_core.global`, replaced by the current one.

    Raises:
        ValueError: the file has both names.
    """
    renamed = {key.replace("nara_core.global.", "nara_core.shared."): tensor for key, tensor in tensors.items()}
    if len(renamed) != len(tensors):
        raise ValueError(
            "The checkpoint holds the shared core twice, as 'nara_core.shared' and by its old name 'nara_core.global': "
            "leave one of them out."
        )
    return renamed
