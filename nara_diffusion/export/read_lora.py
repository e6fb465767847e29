"""Read a LoRA from a PEFT folder or, for a pipeline, from a file that Diffusers can read.

The pipeline's `lora_state_dict` converts files with Diffusers' own names, kohya's and others. It
drops DoRA keys in kohya's files, and layers that match no module, with a warning at most. This
module raises an error in both cases.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import diffusers
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME
from torch import Tensor, nn

from nara_diffusion.config import OTHER_PREDICTION
from nara_diffusion.loaders.components import TEXT_ENCODER, denoiser_name
from nara_diffusion.loaders.tensor_files import (
    is_nara,
    locate,
    read_peft_tensors,
    read_tensors,
)
from nara_diffusion.strict import PEFT_PREFIX
from nara_diffusion.utils.wording import listed

from .host_files import with_text_model
from .plain_lora import PlainLora, extra_tensors, layers_of_tensors

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

_ODD = re.compile(r"dora_scale|hada_|lokr_|oft_|lora_mid|glora|\.diff(_b)?$")
"""Keys of a DoRA in kohya's format, and of LyCORIS methods."""
_DOWN = re.compile(
    r"(.+?)[._](lora_A|lora_down|lora\.down|lora_linear_layer\.down|lora_embedding_A)(\.weight)?"
)
"""The key of a layer's A, in any format."""
_COMFYUI = re.compile(r"diffusion_model\.(.+)\.lora_([AB])\.weight")
_PEFTS = re.compile(r"\.lora_(A|B|embedding|magnitude)")

Values = dict[str, tuple[Tensor, float | None]]
"""{key: (tensor, the alpha of its layer, or None)}."""


def read_lora(
    lora: str | os.PathLike[str], model: nn.Module | DiffusionPipeline
) -> dict[str, PlainLora]:
    """Return {component: its LoRA}. If `model` isn't a pipeline, the component has an empty name.

    Raises:
        ValueError: `lora` can't be read; see `from_lora`.
    """
    path = Path(lora).expanduser()
    if is_nara(path):
        raise ValueError(
            "it already depends on the noise level. Load it with pipe.load_nara_weights(…), or a folder in PEFT's "
            "format with PeftModel.from_pretrained(model, folder)."
        )
    if (path / CONFIG_NAME).is_file():
        scheduler = path / "scheduler" / "scheduler_config.json"
        if scheduler.is_file():
            raise ValueError(f"it has '{scheduler.relative_to(path)}': {OTHER_PREDICTION}")
        config = PeftConfig.from_pretrained(str(path))
        if type(config) is not LoraConfig:
            kind = type(config).__name__.removesuffix("Config")
            raise ValueError(f"it is a {kind}, not a LoRA.")
        component = denoiser_name(model) if is_pipeline(model) else ""
        parts = {component: _plain_lora(config, read_peft_tensors(path))}
    else:
        parts = _read_file(locate(path, None, None, {}), model)
    for part in parts.values():
        if part.others or part.config.lora_bias:
            extra = next(iter(part.others), "biases of B")
            raise ValueError(
                f"it has trained '{extra}' in addition to a LoRA's factors, and a NaRA can't start from that."
            )
    return parts


def is_pipeline(model: object) -> TypeGuard[DiffusionPipeline]:
    """Return whether `model` is a Diffusers pipeline, importing the base class only here."""
    return isinstance(model, diffusers.DiffusionPipeline)  # type: ignore[attr-defined]


def _plain_lora(config: LoraConfig, tensors: Mapping[str, Tensor]) -> PlainLora:
    tensors = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in tensors.items()}
    return PlainLora(config, layers_of_tensors(config, tensors), extra_tensors(tensors))


def _read_file(path: Path, pipe: nn.Module | DiffusionPipeline) -> dict[str, PlainLora]:
    """Return {component: its LoRA} from a file."""
    tensors, metadata = read_tensors(path)
    metadata = metadata or {}
    if "nara_scheduler" in metadata:
        raise ValueError(f"it has nara_scheduler in its metadata: {OTHER_PREDICTION}")
    if not is_pipeline(pipe):
        raise ValueError(
            "it is not a folder in PEFT's form, with an adapter_config.json. A file of another form can be read only "
            f"for a pipeline. Pass such a folder, or the pipeline instead of {type(pipe).__name__}."
        )
    if odd := list(filter(_ODD.search, tensors)):
        raise ValueError(
            f"it has '{odd[0]}', a key of a DoRA in kohya's format or of a LyCORIS method, which Diffusers doesn't "
            "read. Convert it to PEFT's format with the program that wrote it, or start from another LoRA."
        )
    state, alphas = _converted_by_diffusers(tensors, pipe)
    components: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        components.setdefault(key.partition(".")[0], {})[key] = tensor
    configs, parts = _saved_configs(metadata), {}
    for component, converted in components.items():
        if not isinstance(getattr(pipe, component, None), nn.Module):
            raise ValueError(
                f"it is for '{component}', which {type(pipe).__name__} doesn't have. Pass the pipeline that it is for."
            )
        values = _by_peft_names(converted, alphas, component, pipe)
        config = configs.get(component) or _inferred_config(values)
        tensors_only = {key: tensor for key, (tensor, _) in values.items()}
        parts[component] = _plain_lora(config, tensors_only)
    names = {match[1] for match in map(_DOWN.fullmatch, tensors) if match}
    if not parts or sum(len(part.layers) for part in parts.values()) < len(names):
        raise ValueError(
            f"it has {len(names)} layers of a LoRA, but Diffusers' converters lose some of them. Convert it to PEFT's "
            "format with the program that wrote it."
        )
    return parts


def _converted_by_diffusers(
    tensors: Mapping[str, Tensor], pipe: DiffusionPipeline
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return {key: tensor} and {key of an alpha: alpha}, with the keys that Diffusers uses."""
    converter: Any = pipe
    options: dict[str, Any] = {}
    if hasattr(converter, "unet"):
        options["unet_config"] = converter.unet.config
        tensors = {_kohya_key(key): tensor for key, tensor in tensors.items()}
    try:
        converted = converter.lora_state_dict(dict(tensors), **options)
    except (AttributeError, ValueError, KeyError, IndexError, NotImplementedError) as error:
        kind = type(pipe).__name__
        raise ValueError(f"Diffusers can't read it as a LoRA for {kind}: {error}") from error
    state, alphas = converted if isinstance(converted, tuple) else (converted, None)
    return dict(state), {key: float(alpha) for key, alpha in (alphas or {}).items()}


def _kohya_key(key: str) -> str:
    """Return kohya's key for ComfyUI's key of a UNet module, or any other `key` unchanged."""
    match = _COMFYUI.fullmatch(key)
    if match is None:
        return key
    kind = "down" if match[2] == "A" else "up"
    return f"lora_unet_{match[1].replace('.', '_')}.lora_{kind}.weight"


def _by_peft_names(
    tensors: Mapping[str, Tensor],
    alphas: Mapping[str, float],
    component: str,
    pipe: DiffusionPipeline,
) -> Values:
    """Return the values by PEFT's keys, without the component's prefix."""
    values: Values = {}
    for key, tensor in tensors.items():
        layer = key.partition(".lora.")[0]
        alpha_keys = f"{layer}.alpha", key.replace(".lora_A.weight", ".alpha"), f"{key}.alpha"
        alpha = next((alphas[name] for name in alpha_keys if name in alphas), None)
        values[key.removeprefix(f"{component}.")] = (tensor, alpha)
    if not component.startswith(TEXT_ENCODER):
        return convert_unet_state_dict_to_peft(values)
    if not any(map(_PEFTS.search, values)):
        values = convert_state_dict_to_peft(values)
    if hasattr(getattr(pipe, component), "text_model"):
        return {with_text_model(key): value for key, value in values.items()}
    return {key.removeprefix("text_model."): value for key, value in values.items()}


def _inferred_config(values: Values) -> LoraConfig:
    """Return a configuration for a file that has none.

    The configuration lists the full name of each module. The ranks are those of A. α is the file's;
    if the file has no α, it is the rank, which makes the scale 1.
    """
    down = {key.partition(".lora_A.")[0]: values[key] for key in values if ".lora_A." in key}
    if not down:
        raise ValueError(
            f"it has no LoRA in PEFT's or Diffusers' format, but {listed(values) or 'nothing'}."
        )
    ranks = {name: len(A) for name, (A, _) in down.items()}
    alphas = {name: alpha or float(ranks[name]) for name, (_, alpha) in down.items()}
    rank, alpha = next(zip(ranks.values(), alphas.values(), strict=True))
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        use_dora=any(".lora_magnitude_vector" in key for key in values),
        inference_mode=True,
        # a pattern, since a name in a list is also the end of other names
        target_modules="|".join(map(re.escape, sorted(ranks))),
        rank_pattern=_pattern(ranks, rank),
        alpha_pattern=_pattern(alphas, alpha),
    )


def _pattern(values: Mapping[str, float], default: float) -> dict[str, Any]:
    """Return {pattern for a module: its value} for all values that differ from `default`."""
    return {f"^{re.escape(name)}": value for name, value in values.items() if value != default}


def _saved_configs(metadata: Mapping[str, str]) -> dict[str, LoraConfig]:
    """Return {component: its configuration} from the metadata that `save_lora_weights` writes."""
    components: dict[str, dict[str, Any]] = {}
    try:
        for key, value in json.loads(metadata.get(LORA_ADAPTER_METADATA_KEY, "{}")).items():
            component, _, name = key.rpartition(".")
            components.setdefault(component, {})[name] = value
        return {component: LoraConfig(**values) for component, values in components.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"the configuration in its metadata can't be read: {error}") from error
