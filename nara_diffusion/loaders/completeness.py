"""A check after each load: the model has every tensor of the file, and no other adapted layer.

PEFT, Diffusers and Transformers ignore tensors with unexpected names, at most with a warning, and leave their layers at
random values. So adapters of this package are compared with their file after loading.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import CONFIG_NAME
from torch import Tensor, nn

from nara_diffusion.tuner.state_dict import PEFT_PREFIX
from nara_diffusion.utils.listing import listed
from nara_diffusion.utils.named_source import naming_source

from .source import read_peft_weights


def load_peft_adapter(model: nn.Module, source: str | Path, **options: Any) -> PeftModel:
    """`PeftModel.from_pretrained`, with a check that all tensors of the file were loaded.

    Args:
        source: folder or repository. options: `revision`, `subfolder`, ….

    Raises:
        ValueError: nothing is there; the folder's weights are missing or damaged; or as `check_loaded`.
    """
    folder = Path(source, options.get("subfolder") or "")
    is_local = (folder / CONFIG_NAME).is_file()
    if is_local:
        tensors = read_peft_weights(folder)
    else:
        with naming_source(folder, CONFIG_NAME, "an adapter of PEFT's"):
            tensors = load_peft_weights(str(source), device="cpu", **options)
    adapted: Any = PeftModel.from_pretrained(model, str(source), **options)  # type: ignore[arg-type]
    check_loaded(adapted, "default", tensors, str(source))
    return adapted


def load_whole_model(kind: Any, folder: Path, **options: Any) -> Any:
    """`kind.from_pretrained` of Diffusers or Transformers, with a check that all weights were loaded and none ignored.

    Raises:
        ValueError: a tensor is missing or unexpected; the message names it.
    """
    model, loading = kind.from_pretrained(str(folder), output_loading_info=True, **options)
    missing, surplus = (sorted(loading[keys]) for keys in ("missing_keys", "unexpected_keys"))
    lacks = f"lacks {_tensors(missing)} of {kind.__name__}: {listed(missing)}"
    holds = f"holds {_tensors(surplus)} that {kind.__name__} doesn't know: {listed(surplus)}"
    if missing or surplus:
        what = " and ".join(text for text, keys in ((lacks, missing), (holds, surplus)) if keys)
        raise ValueError(f"{folder} {what}. Was it written by another version, or of another model? Save it again.")
    return model


def check_loaded(
    model: Any,
    adapter_name: str,
    tensors: Mapping[str, Tensor],
    origin: str,
    held: Mapping[str, Tensor] | None = None,
) -> None:
    """Compare the adapter in `model` with the `tensors` of the file `origin` that it was loaded from.

    Args:
        model: a PeftModel, or a model with adapters by `inject_adapter_in_model`.
        tensors: by PEFT's names, with or without its prefix.
        held: the tensors in `model`, if PEFT would not return them as loaded; None takes PEFT's.

    Raises:
        ValueError: a tensor is not in the model, or the model has an adapted layer without tensors; the message names
            the layers.
    """
    there = _by_plain_name(held_tensors(model, adapter_name) if held is None else held)
    given = _by_plain_name(tensors)
    lost = [key for key, tensor in given.items() if key not in there or not _equal(there[key], tensor)]
    surplus = [key for key in there if key not in given]
    if not lost and not surplus:
        return
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(model.peft_config[adapter_name].peft_type, "lora_")
    wrong, layers = _layers(lost, prefix), _layers(given, prefix)
    what = f"{len(wrong)} of the {len(layers)} layers in {origin} did not load into {type(model).__name__}"
    if not lost:
        wrong = _layers(surplus, prefix)
        what = f"{type(model).__name__} has {len(wrong)} adapted layers of which there is nothing in {origin}"
    raise ValueError(
        f"{what}: {listed(wrong)}. The file's names, or its configuration, are not those that the installed PEFT, "
        "Diffusers and Transformers expect of this model: save the adapter again with these versions, or load it into "
        "the model that it was trained on."
    )


def held_tensors(model: Any, adapter_name: str) -> dict[str, Tensor]:
    """The adapter's tensors in `model` that PEFT would save, without base weights."""
    # without a state dict, PEFT takes a layer of which AdaLoRA has dropped all directions for a shard
    state = model.state_dict()
    return get_peft_model_state_dict(model, state, adapter_name=adapter_name, save_embedding_layers=False)


def _by_plain_name(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by their names in the model, without what only PEFT adds to them."""
    return {key.removeprefix(PEFT_PREFIX).removesuffix(".weight"): tensor for key, tensor in tensors.items()}


def _equal(held: Tensor, given: Tensor) -> bool:
    if held.is_meta:  # waits on disk
        return held.shape == given.shape
    if held.shape != given.shape:
        return False
    return torch.allclose(held, given.to(held.device, held.dtype), rtol=0, atol=0, equal_nan=True)


def _layers(keys: Iterable[str], prefix: str) -> list[str]:
    """The layers to which the tensors of these keys belong. `prefix`: how the method's own names begin (lora_, …)."""
    names = []
    for key in keys:
        parts = key.split(".")
        own = [i for i, part in enumerate(parts) if part.startswith((prefix, prefix.rstrip("_")))]
        names.append(".".join(parts[: own[0]]) if own and own[0] else key)
    return list(dict.fromkeys(names))


def _tensors(keys: list[str]) -> str:
    return f"{len(keys)} tensor{'s' * (len(keys) != 1)}"
