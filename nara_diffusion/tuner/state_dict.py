"""Names in an adapter's files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor


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
