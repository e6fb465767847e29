"""Extend other libraries by adding three methods to pipelines and replacing five functions.

For a model or file without NaRA, each replacement calls the library's own function. Without the
replacement, the library's function

PEFT           PeftModel.from_pretrained       would leave a partly loaded NaRA after an error
               PeftModel.load_adapter          would do the same
Transformers   PeftAdapterMixin.load_adapter   would read only A and B, and leave the core random
Diffusers      LoraBaseMixin.set_adapters      would accept numbers, but no StrengthSchedule
               lora_base._get_model_file       would load a NaRA as a LoRA, and nothing of a T-LoRA
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import copy
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import diffusers.loaders.lora_base as lora_base
from diffusers.utils.hub_utils import PushToHubMixin
from peft import PeftConfig, PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin as TransformersAdapterMixin
from transformers.utils.loading_report import LoadStateDictInfo

from nara_diffusion.config import NaraConfig
from nara_diffusion.loaders.components import (
    TEXT_ENCODER,
    adapters_of,
    nara_adapters_of,
    uncompiled,
)
from nara_diffusion.loaders.file import naming
from nara_diffusion.loaders.insertion import LOADED_FLAG
from nara_diffusion.loaders.tensor_files import check_peft_weights, is_nara, is_nara_for_peft
from nara_diffusion.noise.strength_schedule import StrengthSchedule
from nara_diffusion.tuner.adding import restored_on_error
from nara_diffusion.tuner.model import NaraModel
from nara_diffusion.tuner.strength import check_strength, give_strength, strength_of

_Function = Callable[..., Any]
_Weight: TypeAlias = "float | StrengthSchedule | Mapping[str, _Weight] | list[_Weight] | None"
"""A weight of `set_adapters`: a number or schedule, or one for each component or block."""
_HUB = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download")


def extend_pipelines(*methods: Callable[..., Any]) -> None:
    """Add `methods` to the two base classes of Diffusers' pipelines once the classes are defined.

    Importing the classes here would take ten times as long as importing this package, and training
    on text does not need them.
    """

    def extend(cls: type) -> None:
        if cls.__name__ in ("DiffusionPipeline", "ModularPipeline"):
            for method in methods:
                setattr(cls, method.__name__, method)

    def init_subclass(cls: type[PushToHubMixin], **kwargs: Any) -> None:
        super(PushToHubMixin, cls).__init_subclass__(**kwargs)
        extend(cls)

    for cls in PushToHubMixin.__subclasses__():
        extend(cls)
    PushToHubMixin.__init_subclass__ = classmethod(init_subclass)  # type: ignore[assignment]


def wrap_other_libraries() -> None:
    """Replace the five functions."""
    _around(PeftModel, "from_pretrained", _from_pretrained)
    _around(PeftModel, "load_adapter", _load_adapter)
    _around(TransformersAdapterMixin, "load_adapter", _load_into_transformers)
    _around(lora_base.LoraBaseMixin, "set_adapters", _set_adapters)
    _around(lora_base, "_get_model_file", _find_lora_file)


def _around(owner: type | ModuleType, name: str, function: _Function) -> None:
    """Replace `owner.name` with a function that calls `function(original, …)`."""
    attribute = inspect.getattr_static(owner, name)
    original = attribute.__func__ if isinstance(attribute, classmethod) else attribute

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(original, *args, **kwargs)

    setattr(owner, name, classmethod(wrapper) if isinstance(attribute, classmethod) else wrapper)


def _from_pretrained(
    original: _Function,
    cls: type[PeftModel],
    model: nn.Module,
    model_id: str | os.PathLike[str],
    adapter_name: str = "default",
    *args: Any,
    **kwargs: Any,
) -> PeftModel:
    is_ours = _is_nara(model_id, kwargs.get("config"), kwargs)
    with _complete(model, model_id, kwargs.get("subfolder")) if is_ours else nullcontext():
        return original(cls, model, model_id, adapter_name, *args, **kwargs)


def _load_adapter(
    original: _Function,
    self: PeftModel,
    model_id: str | os.PathLike[str],
    adapter_name: str,
    *args: Any,
    **kwargs: Any,
) -> Any:
    is_ours = isinstance(self.base_model, NaraModel)
    with _complete(self, model_id, kwargs.get("subfolder")) if is_ours else nullcontext():
        return original(self, model_id, adapter_name, *args, **kwargs)


def _is_nara(
    model_id: str | os.PathLike[str] | None, config: object, options: Mapping[str, Any]
) -> bool:
    """Return True if the adapter to be loaded, from a folder or with `config`, is a NaRA."""
    if config is not None or not model_id:
        return isinstance(config, NaraConfig)
    return is_nara_for_peft(str(model_id), **_hub_options(options))


def _hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in _HUB if options.get(name) is not None}


@contextmanager
def _complete(
    model: nn.Module, model_id: str | os.PathLike[str], subfolder: str | None
) -> Iterator[None]:
    """Load a PEFT folder completely or, after an error that names the folder, not at all."""
    with naming(model_id, subfolder), restored_on_error(model):
        check_peft_weights(model_id, subfolder)
        yield


def _load_into_transformers(
    original: _Function, self: nn.Module, *args: Any, **kwargs: Any
) -> LoadStateDictInfo:
    arguments = dict(inspect.signature(original).bind(self, *args, **kwargs).arguments)
    arguments |= arguments.pop("kwargs", {})
    load_config = arguments.get("load_config")
    base_id = getattr(load_config, "pretrained_model_name_or_path", None)
    model_id = arguments.get("peft_model_id") or base_id
    of_base = getattr(load_config, "download_kwargs", None) or {}
    hub = _hub_options({**of_base, **arguments, **(arguments.get("adapter_kwargs") or {})})
    config = arguments.get("peft_config")
    if not _is_nara(model_id, config, hub):
        return original(self, *args, **kwargs)
    name = arguments.get("adapter_name") or "default"
    if name in adapters_of(self):
        raise ValueError(
            f"The model already has an adapter '{name}', and load_adapter does not replace it with a NaRA. Pass "
            "another adapter_name, or call delete_adapter first."
        )
    tensors = arguments.get("adapter_state_dict")
    named = naming(model_id, hub.get("subfolder")) if model_id else nullcontext()
    with named, restored_on_error(self):
        config = copy(config or PeftConfig.from_pretrained(model_id, **hub))  # type: ignore[arg-type]
        config.inference_mode = not arguments.get("is_trainable", False)
        if not tensors:
            check_peft_weights(model_id, hub.get("subfolder"))  # type: ignore[arg-type]
            tensors = load_peft_weights(model_id, device="cpu", **hub)  # type: ignore[arg-type]
        inject_adapter_in_model(config, self, name)
        set_peft_model_state_dict(self, tensors, name)
        vars(self)[LOADED_FLAG] = True
    if config.inference_mode:
        self.eval()
    # Transformers' report of a load that used all tensors
    empty: dict[str, Any] = {field.name: set() for field in dataclasses.fields(LoadStateDictInfo)}
    return LoadStateDictInfo(**empty | {"error_msgs": [], "conversion_errors": {}})


def _set_adapters(
    original: _Function,
    pipe: lora_base.LoraBaseMixin,
    adapter_names: list[str] | str,
    adapter_weights: _Weight = None,
) -> None:
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    is_list = isinstance(adapter_weights, list)
    weights = adapter_weights if is_list else [adapter_weights] * len(names)
    scheduled = []
    for part in pipe._lora_loadable_modules:
        model: Any = getattr(pipe, part, None)
        if uncompiled(model) is not model and nara_adapters_of(uncompiled(model)):
            raise ValueError(
                f"{part} was returned by torch.compile, and Diffusers finds no adapter in it. Use the original model, "
                f"pipe.{part} = pipe.{part}._orig_mod, and compile it in place, pipe.{part}.compile()."
            )
        for name, weight in zip(names, weights, strict=False):  # Diffusers checks the lengths
            if name not in adapters_of(model):
                continue
            schedule = _schedule(weight.get(part) if isinstance(weight, Mapping) else weight, part)
            if schedule is not None:
                scheduled.append((model, name, schedule))
            if schedule is not None or strength_of(model, name) is not None:
                check_strength(model, name, schedule)
    with restored_on_error(*(model for model, _, _ in scheduled)):
        original(pipe, names, _numbers(adapter_weights))
        for model, name, schedule in scheduled:
            give_strength(model, name, schedule)


def _schedule(weight: _Weight, part: str) -> StrengthSchedule | None:
    """Return the `weight` for component `part` if it is a schedule.

    Raises:
        ValueError: the component has no λ, or the schedule is one block's.
    """
    schedule = weight if isinstance(weight, StrengthSchedule) else None
    is_for_text = schedule is not None and part.startswith(TEXT_ENCODER)
    if is_for_text or (schedule is None and _numbers(weight) != weight):
        reason = "has no λ" if is_for_text else "needs a number for each block"
        raise ValueError(
            f"adapter_weights has a StrengthSchedule for {part}, which {reason}. Pass a schedule for a whole adapter, "
            "or for its part in the denoiser: {'unet': schedule, 'text_encoder': 1.0}."
        )
    return schedule


def _numbers(weights: _Weight) -> _Weight:
    """Return the weights with each schedule replaced by 1."""
    if isinstance(weights, Mapping):
        return {key: _numbers(weight) for key, weight in weights.items()}
    if isinstance(weights, list):
        return [_numbers(weight) for weight in weights]
    return 1.0 if isinstance(weights, StrengthSchedule) else weights


def _find_lora_file(original: _Function, *args: Any, **kwargs: Any) -> str:
    path = original(*args, **kwargs)
    if is_nara(Path(path)):
        raise ValueError(
            f"'{path}' contains an adapter that depends on the noise level, which loading it as a LoRA would lose. "
            "Load it with pipe.load_nara_weights(…)."
        )
    return path
