"""Compare a part of an adapter's file with its own configuration, without the base model."""

from __future__ import annotations

import re

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor

from nara_diffusion.config import NaraConfig
from nara_diffusion.cores.core_set import NAME_IN_FILES, is_core_key, make_cores
from nara_diffusion.cores.registry import BUILT_IN
from nara_diffusion.strict import check_tensors

from .adapter_part import AdapterPart


def check_part(part: AdapterPart, *, beside: bool, for_model: bool) -> None:
    """Compare the tensors of a file with those that its configuration describes.

    Args:
        part: the part of the file to check.
        beside: True if a file of this form may also contain biases, tokens, embeddings and
            `modules_to_save`.
        for_model: True to compare only the modules with `target_modules`, because the caller will
            compare the tensors with those of a model.

    Raises:
        ValueError: no module has factors, or `target_modules` don't name one that has; or
            `check_tensors` raises an error.
    """
    if not part.modules:
        raise ValueError(
            "The adapter has no A and B of any module. Download or save the file again."
        )
    targets = part.config.target_modules
    for name in part.modules if targets not in (None, "all-linear") else ():
        if not check_target_module_exists(part.config, name.partition(".base_layer")[0]):
            raise ValueError(
                f"The adapter has A and B of '{name}', which is not in its target_modules {targets}. The file is "
                "damaged: download or save it again."
            )
    if for_model:
        return
    with torch.device("meta" if part.config.core_type in BUILT_IN else "cpu"):
        cores = make_cores(part.config, part.core_ranks)
    expected = cores.state_dict(prefix=f"{NAME_IN_FILES}.")
    for name, rank in part.modules.items():
        expected |= _factors(part, name, rank)
    allowed = dict(expected)
    for key, tensor in part.tensors.items():
        if beside and key not in expected and _may_stand_beside(part.config, key, tensor):
            allowed[key] = tensor
    check_tensors(part.tensors, expected, allowed)


def _factors(part: AdapterPart, name: str, rank: int) -> dict[str, Tensor]:
    """Return {key: an empty tensor of the expected shape and dtype} for a module's factors.

    The sizes of the base's layer are taken from the file.
    """
    tensors = part.tensors
    A, B = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
    if any(key.startswith(f"{name}.lora_embedding_") for key in tensors):
        A, B = f"{name}.lora_embedding_A", f"{name}.lora_embedding_B"
    shape_A, shape_B = _shape(tensors.get(A)), _shape(tensors.get(B))
    d_out, width = shape_B[:2]
    kernel = (1,) * len(shape_A[2:])
    is_grouped = kernel and width and rank % width == 0  # then B is (d_out, rank / groups, 1, …)
    shapes: dict[str, tuple[int, ...]] = {
        A: (rank, *shape_A[1:]),
        B: (d_out, width if is_grouped else rank, *kernel),
    }
    if part.config.use_dora:
        key = f"{name}.lora_magnitude_vector"
        key = f"{key}.weight" if f"{key}.weight" in tensors else key
        shapes[key] = (1, d_out, *kernel) if kernel else (d_out,)
    if part.config.lora_bias:
        shapes[f"{name}.lora_B.bias"] = (d_out,)
    expected = {}
    for key, shape in shapes.items():
        dtype = getattr(tensors.get(key), "dtype", torch.float32)
        is_usual = dtype.is_floating_point and dtype.itemsize > 1  # layers can compute in it
        expected[key] = torch.empty(
            shape, dtype=dtype if is_usual else torch.float32, device="meta"
        )
    return expected


def _shape(tensor: object) -> tuple[int, ...]:
    """Return a tensor's shape, extended to at least two axes."""
    shape = tuple(getattr(tensor, "shape", ()))
    return shape if len(shape) > 1 else (*shape, 1, 1)[:2]


def _may_stand_beside(config: NaraConfig, key: str, tensor: object) -> bool:
    """Return whether a tensor other than a factor, such as a bias, may be in the file."""
    if not isinstance(tensor, Tensor) or ".lora_" in key or is_core_key(key):
        return False
    module, _, kind = key.rpartition(".")
    patterns = [rf"(^|.*\.){name}($|\..*)" for name in config.modules_to_save or ()]
    is_saved = any(re.match(pattern, module) for pattern in patterns)
    is_embedding = (
        kind == "weight" and tensor.dim() == 2
    )  # PEFT saves those of a resized vocabulary
    is_bias = kind == "bias" and config.bias != "none"
    return is_saved or is_embedding or is_bias or "trainable_tokens" in kind
