"""Convert the names of an adapter's tensors between a model and its files.

    in the model   …lora_A.{adapter}.weight     lora_core.cores.{adapter}.{group}.…
    in a file      …lora_A.weight               nara_core.{group}.…

PEFT renames the factors; this file renames the cores, and finds the tensors of a file among a
model's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import pairwise

from torch import Tensor, nn

from nara_diffusion.cores.core_set import HOLDER_NAME, NAME_IN_FILES
from nara_diffusion.noise.context import find_holders
from nara_diffusion.strict import PEFT_PREFIX, check_core_precision

_AS_IN_MODEL = (
    "leave state_dict out, or convert only A and B, and give the core as model.state_dict() has it"
)


def with_names_in_files(tensors: Mapping[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
    """Return a model's `tensors`, with core tensors under the names that files use."""
    in_model = f"{HOLDER_NAME}.cores.{adapter_name}."
    return {key.replace(in_model, f"{NAME_IN_FILES}."): tensor for key, tensor in tensors.items()}


def core_name_in_file(key: str, adapter_name: str) -> str | None:
    """Return a core tensor's name in files, or None if `key` isn't a core tensor of this adapter."""
    prefix, holder, suffix = key.rpartition(f"{HOLDER_NAME}.cores.{adapter_name}.")
    return f"{prefix}{NAME_IN_FILES}.{suffix}" if holder else None


def with_model_names(
    mapped: Mapping[str, Tensor], present: Iterable[str], adapter_name: str
) -> dict[str, Tensor]:
    """Return the tensors of a file under the names of the model.

    Args:
        mapped: the tensors, with the factors renamed by PEFT.
        present: the names in the model's state dict.
    """
    name_in_model = {core_name_in_file(key, adapter_name) or key: key for key in present}
    return {
        name_in_model.get(key, name_in_model.get(key.removeprefix(PEFT_PREFIX), key)): tensor
        for key, tensor in mapped.items()
    }


def expected_tensors(
    model: nn.Module, selected: Mapping[str, Tensor], adapter_name: str
) -> dict[str, Tensor]:
    """Return the tensors that a file of this adapter must contain, by their names in the model.

    Args:
        selected: the tensors, without cores, that PEFT would save for the adapter, each once.
    """
    present = model.state_dict()
    cores = {key: present[key] for key in present if core_name_in_file(key, adapter_name)}
    # PEFT leaves out ".weight" of DoRA's magnitudes
    names = {key: key if key in present else f"{key}.weight" for key in selected}
    return cores | {names[key]: tensor for key, tensor in selected.items()}


def without_adapters(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Return the tensors without any that have one of these adapter names in their keys."""
    parts = [f".{name}." for name in names]
    return {
        key: tensor
        for key, tensor in tensors.items()
        if not any(part in f"{key}." for part in parts)
    }


def core_tensors(
    state_dict: Mapping[str, Tensor], model: nn.Module, adapter_name: str
) -> dict[str, Tensor]:
    """Return the tensors of an adapter's cores in `state_dict`.

    `state_dict` may come from a wrapper of `model`.

    Raises:
        ValueError: a tensor is missing, or not float32.
    """
    cores = {}
    holders = [holder for holder in find_holders(model) if adapter_name in holder.cores]
    for holder in holders:
        for name, like in holder.cores[adapter_name].state_dict().items():
            end = f"{HOLDER_NAME}.cores.{adapter_name}.{name}"
            key = next((key for key in state_dict if key.endswith(end)), None)
            if key is None:
                raise ValueError(
                    f"'{name}' of the core of adapter '{adapter_name}' is missing from the state_dict "
                    f"to be saved: {_AS_IN_MODEL}."
                )
            cores[key] = state_dict[key]
            check_core_precision(
                key, cores[key], like, "in the state_dict to be saved", _AS_IN_MODEL
            )
    return cores


def without_second_biases(tensors: Mapping[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
    """Return a file's `tensors` without PEFT's copies of biases in `modules_to_save`.

    PEFT writes such copies if `bias` is "all".
    """
    copy = re.compile(rf"\.modules_to_save\.(?!{re.escape(adapter_name)}\.)(.*\.)?bias$")
    return {key: tensor for key, tensor in tensors.items() if not copy.search(key)}


def check_adapter_names(model: nn.Module, names: set[str]) -> None:
    """Raise ValueError if the name of one of several adapters is also a part of a key.

    When saving, PEFT would then skip tensors of that adapter or of another. If there is only one
    adapter, PEFT saves all tensors.
    """
    for key in model.state_dict():
        if not any(part in key for part in (".lora_", ".base_layer.", f"{HOLDER_NAME}.")):
            continue
        for part, name in pairwise(f"{PEFT_PREFIX}{key}".split(".")):
            is_before_name = part.startswith(("lora_", "cores", "modules_to_save"))
            if name in names and (part == HOLDER_NAME or not is_before_name):
                raise ValueError(
                    f"The adapter name '{name}' is also a part of '{key}', so PEFT would leave tensors "
                    "out when it saves one of several adapters. Choose another name."
                )
