"""The file of a pipeline's NaRA: one safetensors file, whose metadata holds what the tensors alone do not say.

    unet.down_blocks.1.….to_q.lora_A.weight      A, B and, for DoRA, the magnitude, of each adapted module
    unet.nara_core.global.layers.0.weight        the core, once a component
    text_encoder.….q_proj.lora_A.weight          text encoders run before there is a λ: C = I
    __metadata__["nara_adapter_metadata"]        {"format_version": 1, "components": {"unet": NaraConfig's fields, …}}

λ's convention and η are part of the configuration: neither can be read off the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

from torch import Tensor

from nara_diffusion.config import NaraConfig
from nara_diffusion.holder import HOLDER_NAME

WEIGHTS_NAME = "pytorch_nara_weights.safetensors"
METADATA_KEY = "nara_adapter_metadata"
FORMAT_VERSION = 1

_OF_ONE_MACHINE = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"}
"""Fields of a configuration that say where it was made; the others say what the adapter is."""


@dataclass(frozen=True)
class AdapterPart:
    """What an adapter is in one component of a pipeline: its configuration, and its tensors by their names in it."""

    config: NaraConfig
    tensors: dict[str, Tensor]


def pack(parts: Mapping[str, AdapterPart]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of one file."""
    tensors = {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.tensors.items()}
    content = {
        "format_version": FORMAT_VERSION,
        "components": {name: config_to_fields(part.config) for name, part in parts.items()},
    }
    return tensors, {"format": "pt", METADATA_KEY: json.dumps(content, indent=2, sort_keys=True)}


def unpack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None, origin: str) -> dict[str, AdapterPart]:
    """`pack` undone. `origin` is what to call the file or dictionary in messages.

    Raises:
        ValueError: another kind of file, one of a newer version, or tensors without a configuration.
    """
    if not metadata or METADATA_KEY not in metadata:
        raise ValueError(_what_it_is_instead(tensors, origin))
    configs = _configs(metadata[METADATA_KEY], origin)
    split: dict[str, dict[str, Tensor]] = {name: {} for name in configs}
    for key, tensor in tensors.items():
        component, _, rest = key.partition(".")
        if component not in split:
            raise ValueError(f"{origin} holds '{key}', but its configuration knows {_names(configs)} only: damaged.")
        split[component][rest] = tensor
    for component, own in split.items():
        if not own:
            raise ValueError(f"{origin} has a configuration for '{component}', but none of its tensors: damaged.")
    return {component: AdapterPart(configs[component], own) for component, own in split.items()}


def _configs(text: str, origin: str) -> dict[str, NaraConfig]:
    try:
        content = json.loads(text)
        version, components = content["format_version"], dict(content["components"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"The configuration in the metadata of {origin} can't be read ({error!r}): damaged.") from None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{origin} has format version {version}, this nara-diffusion reads {FORMAT_VERSION}: update the package, "
            "or save the adapter again with this one."
        )
    return {name: config_from_fields(own, f"{origin}, '{name}'") for name, own in components.items()}


def config_to_fields(config: NaraConfig) -> dict[str, Any]:
    """What JSON can hold of a configuration, without what belongs to one machine."""
    return {
        key: _plain(value)
        for key, value in config.to_dict().items()
        if key not in _OF_ONE_MACHINE and value is not None
    }


def config_from_fields(given: Mapping[str, Any], origin: str) -> NaraConfig:
    """A configuration from `config_to_fields`, or from the adapter_config.json that PEFT writes.

    Raises:
        ValueError: a field that this version does not know and that is set, or a value that NaraConfig refuses.
    """
    known = {field.name for field in fields(NaraConfig) if field.init}
    unknown = sorted(key for key, value in given.items() if key not in known | _OF_ONE_MACHINE and value)
    if unknown:
        raise ValueError(
            f"{origin} sets {', '.join(unknown)}, which this version of nara-diffusion and PEFT does not know: update "
            "them, or save the adapter again with these."
        )
    try:
        return NaraConfig(**{key: value for key, value in given.items() if key in known - _OF_ONE_MACHINE})
    except (TypeError, ValueError) as error:
        raise ValueError(f"The configuration of {origin} is refused: {error}") from error


def is_core_key(key: str) -> bool:
    """Whether a tensor of that name belongs to a core, and its file so to a NaRA."""
    return HOLDER_NAME in key.split(".")


def _what_it_is_instead(keys: Iterable[str], origin: str) -> str:
    keys = list(keys)
    if any(is_core_key(key) for key in keys):
        return (
            f"{origin} holds the cores of a NaRA without its configuration (η, α, λ's convention), which stands in the "
            "metadata of the file that save_nara_weights writes: pass that file, or, with a dict, "
            "metadata=safetensors.safe_open(file, 'pt').metadata()."
        )
    if any("lora" in key for key in keys):
        return f"{origin} is a LoRA, without core: load it by pipe.load_lora_weights(…)."
    shown = ", ".join(f"'{key}'" for key in keys[:3])
    return f"{origin} is no NaRA adapter: it holds {shown or 'no tensor'}. Pass what pipe.save_nara_weights(…) wrote."


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "nothing"


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set):
        return sorted(value)
    return list(value) if isinstance(value, tuple) else value
