"""Reading LoRA files by Diffusers' own converters: Diffusers' old and new keys, kohya's, and others.

What Diffusers drops with a warning or without one is an error here: kohya's keys of DoRA, and alphas and layers that
match no module. Without alpha in the file the scale is 1, as in Diffusers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from peft import LoraConfig
from torch import Tensor, nn

from nara_diffusion.loaders.insertion import TEXT_ENCODER
from nara_diffusion.loaders.schedulers import DENOISERS

from .comfyui_names import with_kohya_names
from .config import config_of_layers
from .plain_lora import PlainLora
from .tensors import by_layer, lora_of_tensors, plain_layer, with_text_model

_DOWN = re.compile(r"(.+?)[._](?:lora_A|lora_down|lora\.down|lora_linear_layer\.down|lora_embedding_A)(?:\.weight)?")


def read_diffusers(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None, model: Any, origin: str
) -> dict[str, PlainLora]:
    """{component: its LoRA}; {"": the LoRA} if `model` is no pipeline.

    Args:
        tensors, metadata: of the file. model: the pipeline, or one of its components. origin: names the file in
            messages.

    Raises:
        ValueError: a tensor of the file can't be read, or `model` has no component for it.
    """
    _check_readable(tensors, origin)
    converted, alphas = _by_diffusers(tensors, model, origin)
    configs = _configs(metadata, origin)
    parts = {}
    for component, own in _by_component(converted, model, origin).items():
        prefix = f"{component}." if component else ""
        renamed = _by_peft_names(own, {key: alphas.pop(key) for key in list(alphas) if key in own}, component)
        renamed = {_in_model(key, model, component): value for key, value in renamed.items()}
        name = component if isinstance(model, DiffusionPipeline) else ""
        config = configs.get(component) or (next(iter(configs.values())) if len(configs) == 1 and not prefix else None)
        parts[name] = _part(renamed, config, origin)
    if alphas:
        raise ValueError(f"{origin} has an alpha for '{next(iter(alphas))}', but no such layer: it is damaged.")
    _check_complete(tensors, parts, origin)
    return parts


def _check_readable(tensors: Mapping[str, Tensor], origin: str) -> None:
    for key in tensors:
        if "dora_scale" in key:
            raise ValueError(
                f"{origin} holds '{key}': a DoRA with kohya's or LyCORIS' keys, which Diffusers doesn't read. Convert "
                "it to PEFT's format with the program that wrote it, or start from another LoRA."
            )
        if re.search(r"hada_|lokr_|oft_|lora_mid|glora|\.diff(_b)?$", key):
            raise ValueError(f"{origin} holds '{key}', a key of a LyCORIS method (LoHa, LoKr, …): pass a LoRA.")


def _by_diffusers(tensors: Mapping[str, Tensor], model: Any, origin: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    """{Diffusers' key, with the component: tensor}, and {key of A: alpha}."""
    if isinstance(model, DiffusionPipeline):
        kind: Any = type(model)
        options = {"unet_config": model.unet.config} if hasattr(model, "unet") else {}
    elif isinstance(model, UNet2DConditionModel):
        kind, options = StableDiffusionXLPipeline, {"unet_config": model.config}
    else:
        return dict(tensors), {}
    if not hasattr(kind, "lora_state_dict"):
        raise ValueError(f"Diffusers loads no LoRA into {kind.__name__}, so {origin} can't be read for it.")
    try:
        found = kind.lora_state_dict(with_kohya_names(tensors, kind, "unet_config" in options), **options)
    except (ValueError, KeyError, IndexError, NotImplementedError) as error:
        raise ValueError(f"{origin} is no LoRA that Diffusers reads for {kind.__name__}: {error}") from error
    state, alphas = found if isinstance(found, tuple) else (found, None)
    return state, _of_keys(state, alphas or {}, origin)


def _of_keys(state: Mapping[str, Tensor], alphas: Mapping[str, Any], origin: str) -> dict[str, float]:
    """{key of A: alpha}, by the keys that the converters give to alphas."""
    left, found = dict(alphas), {}
    for key in state:
        for name in (f"{key.split('.lora.')[0]}.alpha", key.replace(".lora_A.weight", ".alpha"), f"{key}.alpha"):
            if name in left and _DOWN.fullmatch(key):
                found[key] = float(left.pop(name))
    if left:
        raise ValueError(f"{origin} has '{next(iter(left))}', but no such layer: it is damaged.")
    return found


def _by_component(tensors: Mapping[str, Tensor], model: Any, origin: str) -> dict[str, dict[str, Tensor]]:
    split: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        first = key.partition(".")[0]
        component = first if first in DENOISERS or first.startswith(TEXT_ENCODER) else ""
        split.setdefault(component, {})[key] = tensor
    if isinstance(model, DiffusionPipeline):
        for component, own in split.items():
            if not isinstance(getattr(model, component or "?", None), nn.Module):
                raise ValueError(
                    f"{origin} holds '{next(iter(own))}', but {type(model).__name__} has no such component: pass "
                    "the pipeline that it was trained on."
                )
    elif len(split) > 1:
        raise ValueError(
            f"{origin} is for {', '.join(repr(name) for name in split)}: pass the pipeline, which has them all, "
            f"instead of {type(model).__name__}."
        )
    return split


def _by_peft_names(own: Mapping[str, Tensor], alphas: Mapping[str, float], component: str) -> dict[str, Any]:
    """{PEFT's key without the component: (tensor, its alpha or None)}."""
    values = {key.removeprefix(f"{component}."): (tensor, alphas.get(key)) for key, tensor in own.items()}
    is_peft = {key: bool(re.search(r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)", key)) for key in values}
    old: Any = {key: value for key, value in values.items() if not is_peft[key]}
    if old and component.startswith(TEXT_ENCODER):
        old = convert_state_dict_to_peft(convert_state_dict_to_diffusers(old))
    elif old:
        old = convert_unet_state_dict_to_peft(old)
    return {key: value for key, value in values.items() if is_peft[key]} | old


def _in_model(key: str, model: Any, component: str) -> str:
    """The key with or without `text_model`, as the text encoder of this version of Transformers has it."""
    if not component.startswith(TEXT_ENCODER):
        return key
    encoder = getattr(model, component, None) if isinstance(model, DiffusionPipeline) else model
    return with_text_model(key) if hasattr(encoder, "text_model") else key.removeprefix("text_model.")


def _part(values: Mapping[str, Any], config: LoraConfig | None, origin: str) -> PlainLora:
    tensors = {key: tensor for key, (tensor, _) in values.items()}
    if config is not None:
        return lora_of_tensors(config, tensors, origin)
    found, others = by_layer(tensors, origin)
    if others:
        raise ValueError(f"{origin} holds '{next(iter(others))}', which is no key of a LoRA.")
    alphas = {name: next((values[f"{name}.{kind}"][1] for kind in own if kind.startswith("lora_A")), None)
              for name, own in found.items()}  # fmt: skip
    layers = {name: plain_layer(own, alphas[name] or len(plain_layer(own, 1).A)) for name, own in found.items()}
    return PlainLora(config_of_layers(layers), layers)


def _configs(metadata: Mapping[str, str] | None, origin: str) -> dict[str, LoraConfig]:
    """{component: its configuration}, from the metadata that `save_lora_weights` writes."""
    text = (metadata or {}).get(LORA_ADAPTER_METADATA_KEY)
    if text is None:
        return {}
    try:
        fields: dict[str, Any] = json.loads(text)
        split: dict[str, dict[str, Any]] = {}
        for key, value in fields.items():
            component, _, name = key.partition(".") if "." in key else ("", "", key)
            split.setdefault(component, {})[name] = value
        return {component: LoraConfig(**own) for component, own in split.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"The configuration in the metadata of {origin} can't be read: {error}") from error


def _check_complete(tensors: Mapping[str, Tensor], parts: Mapping[str, PlainLora], origin: str) -> None:
    """Raises ValueError if the converters dropped a layer. A fused projection may have become several layers."""
    held = {match[1] for key in tensors if (match := _DOWN.fullmatch(key))}
    read = sum(len(part.layers) for part in parts.values())
    if read < len(held):
        raise ValueError(
            f"{origin} has {len(held)} layers, of which Diffusers' converters keep {read}: convert it to PEFT's format "
            "with the program that wrote it."
        )
