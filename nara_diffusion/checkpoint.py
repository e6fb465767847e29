"""What an adapter's file has to hold: exactly the tensors of its adapter, finite, the core's in float32."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

_HINT = "Was it saved with another core_type, core_sharing, core_input, noise_embedding, rank or target_modules?"


def check_adapter_tensors(
    given: Mapping[str, Tensor], expected: Mapping[str, Tensor], known: Iterable[str], core_prefix: str
) -> None:
    """Compare a checkpoint with the adapter that it is loaded into, both under the model's names.

    Args:
        given: the checkpoint's tensors. expected: the adapter's. known: all of the model's names, since a checkpoint
            may also hold trained biases, embeddings and `modules_to_save`.
        core_prefix: how the names of the core's tensors begin, e.g. "nara_core.cores.default.".

    Raises:
        ValueError: a tensor is missing, unknown, misshapen or not finite, or one of the core is not float32. A core
            that is missing is never replaced by a fresh draw.
    """
    missing = [key for key in expected if key not in given]
    if missing:
        raise ValueError(f"The checkpoint lacks {_some(missing)}. {_HINT}")
    known = set(known)
    unknown = [key for key in given if key not in known]
    if unknown:
        raise ValueError(f"The checkpoint holds {_some(unknown)}, which this adapter does not have. {_HINT}")
    for key, tensor in given.items():
        if key in expected and tensor.shape != expected[key].shape:
            raise ValueError(
                f"'{key}' has shape {tuple(tensor.shape)} in the checkpoint, but this adapter needs "
                f"{tuple(expected[key].shape)}. {_HINT}"
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"'{key}' holds NaN or infinity in the checkpoint: it was saved from a broken run.")
        if core_prefix in key and tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ValueError(
                f"'{key}' is {tensor.dtype} in the checkpoint, but a core is kept in float32, since rounding changes "
                "C(λ) − I by several per cent: save it again without converting it."
            )


def refuse_name_in_key(key: str, adapter_names: Iterable[str]) -> None:
    """PEFT saves an adapter without those of its tensors whose key holds another adapter's name as one of its parts.

    Raises:
        ValueError: one of `adapter_names` is such a part of `key`.
    """
    for name in set(adapter_names).intersection(key.split(".")):
        raise ValueError(
            f"adapter '{name}' is named like a part of '{key}': beside another adapter it would make PEFT leave "
            "tensors out when saving. Choose another name."
        )


def _some(keys: list[str]) -> str:
    shown = ", ".join(f"'{key}'" for key in keys[:3])
    return shown if len(keys) <= 3 else f"{shown} and {len(keys) - 3} more tensors"
