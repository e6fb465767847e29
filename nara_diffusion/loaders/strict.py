"""The strict check of an adapter's tensors: all of them, no others, of the right shapes, finite, the core in float32.

PEFT, Diffusers and Transformers ignore tensors with unexpected names, at most with a warning, and leave their layers at
random values. So nothing is half loaded here: `check_tensors` compares a file with the adapter that it is loaded into,
and `check_loaded` any method's adapter with its file afterwards. Files of tensors are read and written whole, or not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nara_diffusion.cores.registry import HOLDER_NAME, NAME_IN_FILES
from nara_diffusion.utils.naming import listed

PEFT_PREFIX = "base_model.model."
"""The beginning of each module's name in PEFT's files."""

PICKLE = (
    "a pickle of torch.save, which may run code when it is read, and isn't read here: get the adapter as "
    "safetensors, or write it as such by safetensors.torch.save_file(torch.load(path, weights_only=True), …)"
)
_HINT = (
    "Was it trained on another base model, or saved with another core_type, core_sharing, noise_embedding, "
    "rank or target_modules?"
)
_OTHER_BASE = (
    "The rank is right, so most likely the adapter was trained on another base model, with layers of other sizes: "
    "load it into that one (`nara inspect FILE` names it where the file does)."
)


def check_tensors(
    given: Mapping[str, Any],
    expected: Mapping[str, Tensor],
    known: Mapping[str, Tensor] | None = None,
) -> None:
    """Compare a file's tensors with those of the adapter that it is loaded into, both under the model's names.

    Args:
        given: of the file. expected: of the adapter; values are not looked at, so they may be on "meta".
        known: all of the model's, where a file may hold embeddings and `modules_to_save` too; None: `expected` alone.

    Raises:
        ValueError: a tensor is missing, unknown, misshapen, of integers where the model has real numbers, or not
            finite, or one of the core is not float32. A core that is missing is never replaced by a fresh draw.
    """
    known = expected if known is None else known
    if missing := [key for key in expected if key not in given]:
        raise ValueError(f"The checkpoint lacks {listed(missing, 'tensors')}. {_HINT}")
    if unknown := [key for key in given if key not in known]:
        raise ValueError(
            f"The checkpoint holds {listed(unknown, 'tensors')}, which this adapter does not have. {_HINT}"
        )
    for key, tensor in given.items():
        _check_tensor(key, tensor, known[key], key in expected)


def _check_tensor(key: str, tensor: Any, like: Tensor, has_shape: bool) -> None:
    if (
        not isinstance(tensor, Tensor)
        or tensor.is_floating_point() != like.is_floating_point()
        or tensor.is_complex()
    ):
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(
            f"'{key}' is {kind} in the checkpoint, where the model has {like.dtype}: save it again without converting "
            "or quantising it."
        )
    if has_shape and tensor.shape != like.shape:
        raise ValueError(
            f"'{key}' has shape {tuple(tensor.shape)} in the checkpoint, but this adapter needs {tuple(like.shape)}. "
            f"{_OTHER_BASE if _is_size_of_base(key, tensor, like) else _HINT} An adapter is loaded whole or not at "
            "all, with ignore_mismatched_sizes=True too."
        )
    if is_core_key(key):
        check_core_precision(
            key, tensor, like, "in the checkpoint", "save it again without converting it"
        )
    if tensor.is_floating_point() and not bool(tensor.to(like.dtype).isfinite().all()):
        raise ValueError(
            f"'{key}' holds NaN or infinity in the checkpoint, or a value too large for its layer: it was saved from a "
            "broken run, or needs the model in bfloat16 or float32."
        )


def _is_size_of_base(key: str, tensor: Tensor, like: Tensor) -> bool:
    """Whether a factor's rank is right, so that a layer of the model has another size than the file's."""
    kind = key.partition(".lora_")[2]
    axis = 0 if "A" in kind else 1  # of r
    return bool(kind) and tensor.dim() == like.dim() > 1 and tensor.shape[axis] == like.shape[axis]


def check_core_precision(key: str, tensor: Tensor, like: Tensor, where: str, remedy: str) -> None:
    """Raises ValueError if a tensor of a core is not float32 (or, if it holds integers, not of the model's dtype).

    Converting a rounded tensor back to float32 does not restore it.
    """
    if tensor.dtype != (torch.float32 if like.is_floating_point() else like.dtype):
        raise ValueError(
            f"'{key}' is {tensor.dtype} {where}, but a core is kept in float32, since rounding changes "
            f"C(λ) − I by several per cent: {remedy}."
        )


def check_adapter_names(model: nn.Module, names: set[str]) -> None:
    """Refuse an adapter that is named like a part of a key: beside another one, PEFT would save neither whole."""
    for key in model.state_dict() if len(names) > 1 else ():
        if not any(part in key for part in (".lora_", ".base_layer.", f"{HOLDER_NAME}.")):
            continue
        parts = f"{PEFT_PREFIX}{key}".split(".")
        for before, name in pairwise(parts):
            is_its_place = (
                before.startswith(("lora_", "cores", "modules_to_save")) and before != HOLDER_NAME
            )
            if name in names and not is_its_place:
                raise ValueError(
                    f"adapter '{name}' is named like a part of '{key}': beside another adapter it would make PEFT "
                    "leave tensors out when saving. Choose another name."
                )


def is_core_key(key: str) -> bool:
    """Whether a tensor of that name, in a file or in a model, belongs to a core. Only a NaRA has one."""
    return not {NAME_IN_FILES, HOLDER_NAME}.isdisjoint(key.split("."))


def with_names_in_files(tensors: Mapping[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
    """`tensors` under the names of the model, with those of the core as files have them."""
    in_model = f"{HOLDER_NAME}.cores.{adapter_name}."
    return {key.replace(in_model, f"{NAME_IN_FILES}."): tensor for key, tensor in tensors.items()}


def without_second_biases(tensors: Mapping[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
    """`tensors` of a file without the copies that PEFT writes of biases in `modules_to_save` if `bias` is "all"."""
    own = f".modules_to_save.{adapter_name}."
    copies = [
        key
        for key in tensors
        if ".modules_to_save." in key and own not in key and key.endswith(".bias")
    ]
    return {key: tensor for key, tensor in tensors.items() if key not in copies}


# ---------------------------------------------------------------------- after a load, for adapters of any method


def check_loaded(model: Any, adapter_name: str, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Compare the adapter in `model` with the `tensors` of the file `origin` that it was loaded from.

    Args:
        model: a PeftModel, or a model with adapters by `inject_adapter_in_model`.
        tensors: by PEFT's names, with or without its prefix.

    Raises:
        ValueError: a tensor is not in the model, or the model has one of which there is nothing in the file.
    """
    there, given = _by_plain_name(held_tensors(model, adapter_name)), _by_plain_name(tensors)
    lost = [
        key for key, tensor in given.items() if key not in there or not _equal(there[key], tensor)
    ]
    surplus = [key for key in there if key not in given]
    if lost or surplus:
        kind = type(model).__name__
        what = f"{len(lost)} of the {len(given)} tensors of {origin} did not load into {kind}: {listed(lost)}"
        if not lost:
            what = f"{kind} has {len(surplus)} tensors of which there is nothing in {origin}: {listed(surplus)}"
        raise ValueError(
            f"{what}. The file's names, or its configuration, are not those that the installed PEFT, Diffusers and "
            "Transformers expect of this model: save the adapter again with these versions, or load it into the model "
            "that it was trained on."
        )


def held_tensors(model: Any, adapter_name: str) -> dict[str, Tensor]:
    """The adapter's tensors in `model` that PEFT would save, without base weights."""
    with beside_configuration():
        return get_peft_model_state_dict(
            model, model.state_dict(), adapter_name=adapter_name, save_embedding_layers=False
        )


_configuration_is_kept: ContextVar[bool] = ContextVar("nara_configuration_is_kept", default=False)


@contextmanager
def beside_configuration() -> Iterator[None]:
    """Inside, `check_keeps_configuration` accepts any model: whoever collects the tensors keeps the configuration."""
    token = _configuration_is_kept.set(True)
    try:
        yield
    finally:
        _configuration_is_kept.reset(token)


def check_keeps_configuration(model: nn.Module, adapter_name: str) -> None:
    """Raises ValueError if the tensors of a NaRA are collected from a model of Diffusers, whose `save_lora_weights` and
    `save_lora_adapter` write no configuration that anything could load."""
    kinds = {kind.__name__ for kind in type(model._modules.get("_orig_mod", model)).__mro__}
    if "ModelMixin" in kinds and not _configuration_is_kept.get():
        raise ValueError(
            f"Adapter '{adapter_name}' is a NaRA, which save_lora_weights and save_lora_adapter would write without "
            "the configuration that loading needs: call pipe.save_nara_weights(folder), or in a training script "
            "checkpoint_nara_weights(accelerator, unet=unet) (docs/other_trainers.md)."
        )


def _by_plain_name(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by their names in the model, without what only PEFT adds to them."""
    return {
        key.removeprefix(PEFT_PREFIX).removesuffix(".weight"): tensor
        for key, tensor in tensors.items()
    }


def _equal(held: Tensor, given: Tensor) -> bool:
    if held.is_meta or held.shape != given.shape:  # on meta: it waits on disk
        return held.shape == given.shape
    return torch.allclose(held, given.to(held.device, held.dtype), rtol=0, atol=0, equal_nan=True)


def load_whole_model(kind: Any, folder: Path, **options: Any) -> Any:
    """`kind.from_pretrained` of Diffusers or Transformers, with a check that all weights were loaded and none ignored.

    Raises:
        ValueError: a tensor is missing or unexpected; the message names it.
    """
    model, loading = kind.from_pretrained(str(folder), output_loading_info=True, **options)
    missing, surplus = (sorted(loading[keys]) for keys in ("missing_keys", "unexpected_keys"))
    if missing or surplus:
        lacks = f"lacks {listed(missing, 'tensors')} of {kind.__name__}" if missing else ""
        holds = (
            f"holds {listed(surplus, 'tensors')}, which {kind.__name__} doesn't have"
            if surplus
            else ""
        )
        what = " and ".join(filter(None, (lacks, holds)))
        raise ValueError(
            f"{folder} {what}. Was it written by another version, or of another model? Save it again."
        )
    return model


# ---------------------------------------------------------------------- files


def check_regular(path: Path) -> None:
    """Raises ValueError if `path` is a link to nothing, or a pipe or device, whose end a reader would wait for."""
    if path.is_symlink() and not path.exists():
        raise ValueError(
            f"'{path}' is a link to '{os.readlink(path)}', which isn't there: download the adapter again."
        )
    if path.exists() and not path.is_file():
        raise ValueError(
            f"'{path}' is no regular file, but a folder, pipe or device: name a safetensors file."
        )


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """Tensors and metadata of a safetensors file, copied, so that the file may be overwritten afterwards.

    Raises:
        ValueError: it is no file, cut off or of another format, such as a pickle.
    """
    check_regular(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: copied(file.get_tensor(key)) for key in file.keys()}, file.metadata()  # noqa: SIM118
    except SafetensorError as error:
        if path.read_bytes()[:2] in (
            b"PK",
            *(b"\x80" + bytes([version]) for version in range(6)),
        ):  # a zip, or bare
            raise ValueError(f"'{path}' is {PICKLE}.") from None
        raise ValueError(
            f"'{path}' is no whole safetensors file ({error}): download or save it again if it was cut off; other "
            "formats are not read."
        ) from None


def save_tensors(
    tensors: Mapping[str, Tensor],
    path: Path,
    metadata: Mapping[str, str] | None = None,
    save_function: Callable[..., Any] | None = None,
) -> None:
    """Write a safetensors file, whole or not at all, as `save_file` of safetensors does.

    Raises:
        OSError: the target is full or can't be written; the message names both.
    """
    try:
        whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
        (save_function or save_file)(
            whole, str(path), metadata={"format": "pt", **(metadata or {})}
        )
    except SafetensorError as error:
        target = Path(*(part for part in path.parts if not part.startswith(".partial-")))
        raise OSError(f"'{target}' can't be written: {error}") from error


def copied(tensor: Any) -> Any:
    """A copy that shares no memory and is aligned like a model's weights, on which the last bits of products depend."""
    return tensor.detach().clone() if isinstance(tensor, Tensor) else tensor
