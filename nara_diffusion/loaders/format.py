"""The file format of a pipeline's NaRA: one safetensors file, with the configurations in its metadata.

    unet.down_blocks.1.….to_q.lora_A.weight      A, B and, for DoRA, the magnitude, of each adapted module
    unet.nara_core.shared.layers.0.weight        the core, once a component
    text_encoder.….q_proj.lora_A.weight          text encoders run before there is a λ: C = I
    __metadata__["nara_adapter_metadata"]        {"format_version": 1, "components": {"unet": NaraConfig's fields, …}}

The configuration includes η and the definition of λ, which the tensors do not show.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from nara_diffusion.config import NaraConfig, config_from_fields, config_to_fields
from nara_diffusion.tuner.holder.core_holder import HOLDER_NAME
from nara_diffusion.tuner.state_dict import with_current_names

WEIGHTS_NAME = "pytorch_nara_weights.safetensors"
METADATA_KEY = "nara_adapter_metadata"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class AdapterPart:
    """The part of an adapter for one component: configuration, and tensors by their names in the component."""

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
    """The inverse of `pack`. `origin` names the file or dictionary in messages.

    Raises:
        ValueError: the file is of another kind or of a newer version, or has tensors without a configuration.
    """
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor) or tensor.is_meta:
            raise ValueError(f"{origin} holds {key!r}, which is no tensor with a text as its name: damaged.")
    if not metadata or METADATA_KEY not in metadata:
        check_program(tensors, origin)
        raise ValueError(_what_it_is_instead(tensors, origin))
    configs = _configs(metadata[METADATA_KEY], origin)
    split: dict[str, dict[str, Tensor]] = {name: {} for name in configs}
    for key, tensor in with_current_names(tensors).items():
        component, _, rest = key.partition(".")
        if component not in split:
            raise ValueError(f"{origin} holds '{key}', but its configuration knows {_names(configs)} only: damaged.")
        split[component][rest] = tensor
    for component, own in split.items():
        if not own:
            raise ValueError(f"{origin} has a configuration for '{component}', but none of its tensors: damaged.")
    return {component: AdapterPart(configs[component], own) for component, own in split.items()}


def check_program(keys: Iterable[str], origin: str) -> None:
    """Raises ValueError for tensors of T-LoRA's programs or MultiAlign's, which as a LoRA would be another adapter."""
    for key in keys:
        if key.endswith(".lambda_layer") or ".lora_time_gamma." in key:
            raise ValueError(
                f"{origin} holds '{key}', a tensor of a T-LoRA or MultiAlign of another program, whose files aren't "
                "read here: load it there, or train it again (core_type='rank_mask' is T-LoRA)."
            )


def _configs(text: str, origin: str) -> dict[str, NaraConfig]:
    where = f"The configuration in the metadata of {origin}"
    try:
        content = dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where} can't be read ({error}): damaged.") from None
    for name in ("format_version", "components"):
        if name not in content:
            raise ValueError(f"{where} has no '{name}': damaged.")
    version, components = content["format_version"], content["components"]
    if not isinstance(version, int) or isinstance(version, bool):
        raise ValueError(f"{where} has format_version {version!r}, where an integer belongs: damaged.")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{origin} has format version {version}, this nara-diffusion reads {FORMAT_VERSION}: update the package, "
            "or save the adapter again with this one."
        )
    if not isinstance(components, dict) or not all(isinstance(own, dict) for own in components.values()):
        raise ValueError(f"{where} has components that are no objects with a configuration each: damaged.")
    return {name: config_from_fields(own, f"{origin}, '{name}'") for name, own in components.items()}


def is_core_key(key: str) -> bool:
    """Whether a tensor of that name belongs to a core. Only the file of a NaRA has one."""
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
