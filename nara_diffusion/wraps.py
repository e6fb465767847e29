"""What other libraries get from this package: three methods of pipelines, and five functions in place of their own.

On a model, or for a file, without NaRA each of the five calls the library's own.

PEFT           PeftModel.from_pretrained       a NaRA that is refused would stay on the base model, half loaded
               PeftModel.load_adapter          the same, beside other adapters
transformers   PeftAdapterMixin.load_adapter   reads A and B by its own names, and leaves a core a fresh draw
Diffusers      LoraBaseMixin.set_adapters      takes numbers: a StrengthSchedule may be among the weights
               lora_base._get_model_file       finds the files of LoRAs: a NaRA's is refused by name
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import copy
from pathlib import Path
from typing import Any

import diffusers.loaders.lora_base as lora_base
from diffusers.utils.hub_utils import PushToHubMixin
from peft import PeftConfig, PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.save_and_load import load_peft_weights
from safetensors import SafetensorError
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin as TransformersAdapterMixin
from transformers.utils.loading_report import LoadStateDictInfo

from nara_diffusion.config import NaraConfig
from nara_diffusion.loaders.insertion import TEXT_ENCODER, adapters_of, nara_adapters_of
from nara_diffusion.loaders.tensor_files import check_regular, is_nara, is_nara_for_peft
from nara_diffusion.noise.strength_schedule import StrengthSchedule
from nara_diffusion.tuner.injection import restored_on_error
from nara_diffusion.tuner.model import NaraModel
from nara_diffusion.tuner.strength import check_strength, give_strength, strength_of

_HUB = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download")


def extend_pipelines(*methods: Callable[..., Any]) -> None:
    """Give `methods` to the two base classes of Diffusers' pipelines, as soon as there are those. To import them here
    would take ten times as long as this package, and who trains text needs none."""

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
    """Install the five. Harmless when repeated."""
    _around(PeftModel, "from_pretrained", _from_pretrained)
    _around(PeftModel, "load_adapter", _load_adapter)
    _around(TransformersAdapterMixin, "load_adapter", _load_into_transformers)
    _around(lora_base.LoraBaseMixin, "set_adapters", _set_adapters)
    _around(lora_base, "_get_model_file", _find_lora_file)


def _around(owner: Any, name: str, function: Callable[..., Any]) -> None:
    """Replace `owner.name`, once, by what calls `function(original, …)` with the arguments of the call."""
    found = inspect.getattr_static(owner, name)
    original = found.__func__ if isinstance(found, classmethod) else found
    if getattr(original, "knows_cores", False):
        return

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(original, *args, **kwargs)

    wrapper.knows_cores = True  # type: ignore[attr-defined]
    setattr(owner, name, classmethod(wrapper) if isinstance(found, classmethod) else wrapper)


# ---------------------------------------------------------------------- PEFT


def _from_pretrained(
    original: Any,
    cls: type,
    model: nn.Module,
    model_id: Any,
    adapter_name: str = "default",
    *args: Any,
    **kwargs: Any,
) -> PeftModel:
    config = kwargs.get("config")
    if not (isinstance(config, NaraConfig) if config is not None else _is_nara(model_id, kwargs)):
        return original(cls, model, model_id, adapter_name, *args, **kwargs)
    with _named(model_id, kwargs), restored_on_error(model):
        return original(cls, model, model_id, adapter_name, *args, **kwargs)


def _load_adapter(
    original: Any, self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any
) -> Any:
    if not isinstance(self.base_model, NaraModel):
        return original(self, model_id, adapter_name, *args, **kwargs)
    with _named(model_id, kwargs), restored_on_error(self):
        return original(self, model_id, adapter_name, *args, **kwargs)


@contextmanager
def _named(model_id: Any, options: Mapping[str, Any]) -> Iterator[None]:
    """Inside, errors get the name of the adapter's folder or repository."""
    where = "/".join(str(part) for part in (model_id, options.get("subfolder")) if part)
    try:
        check_regular(Path(where, SAFETENSORS_WEIGHTS_NAME))
        yield
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        SafetensorError,
    ) as error:  # PEFT's of odd configurations
        if isinstance(error, ValueError) and where in str(error):
            raise
        if isinstance(error, SafetensorError):
            reason = (
                f"its weights are no whole safetensors file ({error}): download or save it again."
            )
        else:
            reason = (
                str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            )
        raise ValueError(f"The adapter in '{where}' is refused: {reason}") from error


def _is_nara(model_id: Any, options: Mapping[str, Any]) -> bool:
    """Return True if the adapter that is about to be loaded is a NaRA."""
    names = ("subfolder", "revision", "cache_dir", "token")
    hub = {name: options[name] for name in names if name in options}
    return is_nara_for_peft(str(model_id), **hub)


# ---------------------------------------------------------------------- transformers


def _load_into_transformers(
    original: Any, self: Any, *args: Any, **kwargs: Any
) -> LoadStateDictInfo:
    given = dict(inspect.signature(original).bind(self, *args, **kwargs).arguments)
    given |= given.pop("kwargs", {})
    load_config = given.get("load_config")
    model_id = given.get("peft_model_id") or getattr(
        load_config, "pretrained_model_name_or_path", None
    )
    of_base = getattr(load_config, "download_kwargs", None) or {}
    options = {**of_base, **given, **(given.get("adapter_kwargs") or {})}
    hub = {name: options[name] for name in _HUB if options.get(name) is not None}
    config = given.get("peft_config")
    if not (
        isinstance(config, NaraConfig)
        if config is not None
        else model_id and _is_nara(model_id, hub)
    ):
        return original(self, *args, **kwargs)
    name = given.get("adapter_name") or "default"
    if name in getattr(self, "peft_config", {}):
        raise ValueError(
            f"The model has an adapter '{name}', and load_adapter swaps no NaRA into its place: pass another "
            "adapter_name, or call delete_adapter of it before."
        )
    with nullcontext() if model_id is None else _named(model_id, hub), restored_on_error(self):
        config = copy(config or PeftConfig.from_pretrained(model_id, **hub))  # type: ignore[arg-type]
        config.inference_mode = not given.get("is_trainable", False)
        tensors = given.get("adapter_state_dict")
        if not tensors:
            tensors = load_peft_weights(model_id, device="cpu", **hub)  # type: ignore[arg-type]
        inject_adapter_in_model(config, self, name)
        set_peft_model_state_dict(self, tensors, name)
        self._hf_peft_config_loaded = True
    if config.inference_mode:
        self.eval()
        for module in (module for module in self.modules() if isinstance(module, BaseTunerLayer)):
            nn.Module.requires_grad_(module, False)  # type: ignore[arg-type]
    empty: dict[str, Any] = {
        "error_msgs": [],
        "conversion_errors": {},
    }  # a report that nothing was left out
    return LoadStateDictInfo(
        **{f.name: empty.get(f.name, set()) for f in dataclasses.fields(LoadStateDictInfo)}
    )


# ---------------------------------------------------------------------- Diffusers


def _set_adapters(
    original: Any, pipe: Any, adapter_names: list[str] | str, adapter_weights: Any = None
) -> None:
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    weights = (
        adapter_weights if isinstance(adapter_weights, list) else [adapter_weights] * len(names)
    )
    models: dict[str, Any] = {
        part: getattr(pipe, part, None) for part in pipe._lora_loadable_modules
    }
    for part, model in models.items():
        original_model = getattr(model, "_orig_mod", None)
        if original_model is not None and nara_adapters_of(original_model):
            raise ValueError(
                f"{part} is what torch.compile returned, in which Diffusers finds no adapter: take the model out, "
                f"pipe.{part} = pipe.{part}._orig_mod, and compile it in place, pipe.{part}.compile()."
            )
    given = [  # where lengths differ, Diffusers has an error
        (part, model, name, weight.get(part) if isinstance(weight, Mapping) else weight)
        for part, model in models.items()
        for name, weight in zip(names, weights, strict=False)
        if name in adapters_of(model)
    ]
    scheduled = [
        (model, name, weight)
        for _, model, name, weight in given
        if isinstance(weight, StrengthSchedule)
    ]
    for part, model, name, weight in given:
        is_schedule = isinstance(weight, StrengthSchedule)
        if _holds_schedule(weight) and (part.startswith(TEXT_ENCODER) or not is_schedule):
            raise ValueError(
                f"adapter_weights has a StrengthSchedule for {part}, of which "
                f"{'there is no λ' if is_schedule else 'each block has a number'}: a schedule is for an adapter, or "
                "for its part in the denoiser, {'unet': schedule, 'text_encoder': 1.0}."
            )
        if is_schedule or strength_of(model, name) is not None:
            check_strength(model, name, weight if is_schedule else None)
    with restored_on_error(*(model for model, _, _ in scheduled)):
        original(pipe, names, _numbers(adapter_weights))
        for model, name, weight in scheduled:
            give_strength(model, name, weight)


def _holds_schedule(weight: Any) -> bool:
    inner = (
        weight.values()
        if isinstance(weight, Mapping)
        else weight
        if isinstance(weight, list)
        else ()
    )
    return isinstance(weight, StrengthSchedule) or any(map(_holds_schedule, inner))


def _numbers(weights: Any) -> Any:
    """The weights with 1 in the place of each schedule."""
    if isinstance(weights, Mapping):
        return {key: _numbers(weight) for key, weight in weights.items()}
    if isinstance(weights, list):
        return [_numbers(weight) for weight in weights]
    return 1.0 if isinstance(weights, StrengthSchedule) else weights


def _find_lora_file(original: Any, *args: Any, **kwargs: Any) -> Any:
    found = original(*args, **kwargs)
    if str(found).endswith(".safetensors") and is_nara(Path(found)):
        raise ValueError(
            f"'{found}' holds a NaRA adapter, of which loading as a LoRA would leave out the core: load it by "
            "pipe.load_nara_weights(…)."
        )
    return found
