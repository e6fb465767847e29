"""Names of an adapter's tensors: in the model, in PEFT's state dicts, and in files.

    in the model   …lora_A.{adapter}.weight     lora_core.cores.{adapter}.{group}.…
    in a file      …lora_A.weight               nara_core.{group}.…

PEFT renames the factors; this file adds the cores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from nara_diffusion.cores.registry import HOLDER_NAME, NAME_IN_FILES
from nara_diffusion.noise.level import find_holders
from nara_diffusion.strict import PEFT_PREFIX, check_core_precision

from .twins import without_twins

_REMEDY = (
    "leave state_dict out, or convert only A and B, and give the core as model.state_dict() has it"
)


def core_name_in_file(key: str, adapter_name: str) -> str | None:
    """Return the name in files of a core's tensor; None if `key` is no core's of this adapter."""
    prefix, holder, rest = key.rpartition(f"{HOLDER_NAME}.cores.{adapter_name}.")
    return f"{prefix}{NAME_IN_FILES}.{rest}" if holder else None


def with_model_names(
    mapped: Mapping[str, Tensor], present: Iterable[str], adapter_name: str
) -> dict[str, Tensor]:
    """Return the tensors of a file under the names of the model.

    Args:
        mapped: the tensors, with the factors renamed by PEFT.
        present: the names in the model's state dict.
    """
    found = dict(mapped)
    for key in present:
        saved = core_name_in_file(key, adapter_name)
        if saved is None:
            continue
        for name in (saved, f"{PEFT_PREFIX}{saved}"):
            if name in found:
                found[key] = found.pop(name)
    names = set(present)
    for key in list(found):
        without_prefix = key.removeprefix(PEFT_PREFIX)
        if key not in names and without_prefix in names:
            found[without_prefix] = found.pop(key)
    return found


def expected_tensors(
    model: nn.Module, selected: Mapping[str, Tensor], adapter_name: str
) -> dict[str, Tensor]:
    """Return the tensors that a file of this adapter has to have, by their names in the model.

    Args:
        selected: the adapter's tensors without its cores, as PEFT would save them.
    """
    present = model.state_dict()
    expected = {}
    for key, tensor in without_twins(model, selected).items():
        is_whole = key in present  # PEFT leaves out ".weight" of DoRA's magnitudes
        expected[key if is_whole else f"{key}.weight"] = tensor
    for key, tensor in present.items():
        if core_name_in_file(key, adapter_name) is not None:
            expected[key] = tensor
    return expected


def without_adapters(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Return the tensors with none of these adapter names in their keys."""
    others = [f".{name}." for name in names]
    found = {}
    for key, tensor in tensors.items():
        if not any(other in f"{key}." for other in others):
            found[key] = tensor
    return found


def core_tensors(
    state_dict: Mapping[str, Tensor], model: nn.Module, adapter_name: str
) -> dict[str, Tensor]:
    """Return the tensors of an adapter's cores in `state_dict`.

    `state_dict` may come from a wrapper of `model`.

    Raises:
        ValueError: a tensor is missing, or not float32.
    """
    found = {}
    for holder in find_holders(model):
        if adapter_name not in holder.cores:
            continue
        for name, like in holder.cores[adapter_name].state_dict().items():
            key = _ending_with(f"{HOLDER_NAME}.cores.{adapter_name}.{name}", state_dict)
            if key is None:
                raise ValueError(
                    f"'{name}' of the core of adapter '{adapter_name}' is missing from what would be saved: {_REMEDY}."
                )
            found[key] = state_dict[key]
            check_core_precision(key, found[key], like, "in the state_dict to be saved", _REMEDY)
    return found


def _ending_with(ending: str, keys: Iterable[str]) -> str | None:
    for key in keys:
        if key.endswith(ending):
            return key
    return None
