"""A wrapper around `load_adapter` of transformers' models, by which their `from_pretrained` reads an adapter's folder.

transformers renames the tensors of A and B and leaves the others out with a warning, so that a core would stay a fresh
draw. The wrapper has PEFT load a NaRA, strictly; other adapters are loaded by transformers.
"""

from __future__ import annotations

import dataclasses
import inspect
from contextlib import nullcontext
from copy import copy
from typing import Any

from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.save_and_load import load_peft_weights
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin
from transformers.utils.loading_report import LoadStateDictInfo

from nara_diffusion.config import NaraConfig
from nara_diffusion.tuner.injection import rollback_on_error
from nara_diffusion.utils.patching import around

from .adapter_files import is_naras_folder, named

_HUB = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download")


def extend_transformers_models() -> None:
    """Install the wrapper. Harmless when repeated."""
    around(PeftAdapterMixin, "load_adapter", _load_adapter, _is_of_nara)


def _is_of_nara(*args: Any, **kwargs: Any) -> bool:
    given = _given(*args, **kwargs)
    if given.get("peft_config") is not None:
        return isinstance(given["peft_config"], NaraConfig)
    model_id = _model_id(given)
    return model_id is not None and is_naras_folder(model_id, _hub_options(given))


def _load_adapter(original: Any, self: Any, *args: Any, **kwargs: Any) -> LoadStateDictInfo:
    """`original`, for a NaRA.

    Raises:
        ValueError: the model has an adapter of that name, in whose place transformers would swap a LoRA; or see
            `state_dict.check_adapter_tensors`. The model is unchanged.
    """
    given = _given(self, *args, **kwargs)
    name = given.get("adapter_name") or "default"
    if name in getattr(self, "peft_config", {}):
        raise ValueError(
            f"The model has an adapter '{name}', and load_adapter swaps no NaRA into its place: pass another "
            "adapter_name, or call delete_adapter of it before."
        )
    model_id, hub = _model_id(given), _hub_options(given)
    with nullcontext() if model_id is None else named(model_id, hub), rollback_on_error(self, name):
        config = copy(given.get("peft_config") or PeftConfig.from_pretrained(model_id, **hub))  # type: ignore[arg-type]
        config.inference_mode = not given.get("is_trainable", False)
        tensors = given.get("adapter_state_dict") or load_peft_weights(model_id, device="cpu", **hub)  # type: ignore[arg-type]
        inject_adapter_in_model(config, self, name)
        set_peft_model_state_dict(self, tensors, name)
    self._hf_peft_config_loaded = True
    if config.inference_mode:
        _freeze(self)
    return _all_loaded()


def _given(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a call of `load_adapter` by their names; those that it passes on are among them."""
    given = dict(inspect.signature(PeftAdapterMixin.load_adapter).bind(*args, **kwargs).arguments)
    return given | given.pop("kwargs", {})


def _model_id(given: dict[str, Any]) -> Any:
    return given.get("peft_model_id") or getattr(given.get("load_config"), "pretrained_model_name_or_path", None)


def _hub_options(given: dict[str, Any]) -> dict[str, Any]:
    of_base = getattr(given.get("load_config"), "download_kwargs", None) or {}
    options = {**of_base, **given, **(given.get("adapter_kwargs") or {})}
    return {name: options[name] for name in _HUB if options.get(name) is not None}


def _freeze(model: nn.Module) -> None:
    model.eval()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.requires_grad_(False)


def _all_loaded() -> LoadStateDictInfo:
    """transformers' report of a load that left nothing out."""
    empty: dict[str, Any] = {"error_msgs": [], "conversion_errors": {}}
    return LoadStateDictInfo(**{f.name: empty.get(f.name, set()) for f in dataclasses.fields(LoadStateDictInfo)})
