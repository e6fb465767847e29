"""Reading a LoRA: a folder of PEFT, a file or dict that Diffusers reads, or a model with one.

Files are converted by `lora_state_dict` of a Diffusers pipeline (Diffusers' own names, kohya's, …). What that drops
with a warning or without one is an error here: keys of DoRA in kohya's files, and layers that match no module.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.utils.state_dict_utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME
from torch import Tensor, nn

from nara_diffusion.config import is_naras, read_config_file
from nara_diffusion.loaders.file import read_peft_tensors, read_tensors
from nara_diffusion.loaders.insertion import TEXT_ENCODER
from nara_diffusion.loaders.schedulers import DENOISERS
from nara_diffusion.loaders.strict import PEFT_PREFIX
from nara_diffusion.utils.naming import listed

from .adapter_factors import adapter_of_model, layers_of_tensors, others_of
from .host_files import SCHEDULER_KEY, with_text_model
from .plain_lora import SCHEDULER, PlainLora, PlainLoraLayer, config_of_layers
from .to_lora import assembled


def read_lora(
    lora: Any, model: Any, *, config: LoraConfig | None = None, source_adapter: str = "default"
) -> tuple[dict[str, PlainLora], str]:
    """{component: its LoRA} ({"": the LoRA} if `model` is no pipeline), and the name of the source in messages.

    Raises:
        ValueError: see `from_lora`.
    """
    if not isinstance(model, (nn.Module, DiffusionPipeline)):
        raise ValueError(f"model is a {type(model).__name__}: pass a torch.nn.Module or a Diffusers pipeline.")
    origin = f"'{lora}'" if isinstance(lora, (str, os.PathLike)) else f"The {type(lora).__name__}"
    try:
        parts = _read(lora, model, config, source_adapter)
        for part in parts.values():
            if part.others or part.config.lora_bias:
                extra = next(iter(part.others), "biases of B")
                raise ValueError(f"it has trained '{extra}' beside a LoRA's factors, which a NaRA can't start from.")
        return parts, origin
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error


def _read(lora: Any, model: Any, config: LoraConfig | None, source_adapter: str) -> dict[str, PlainLora]:
    if isinstance(lora, PlainLora):
        return _of_denoiser(lora, model)
    if isinstance(lora, nn.Module):
        return _of_denoiser(_of_model(lora, source_adapter), model)
    if isinstance(lora, Mapping):
        if config is not None:
            return _of_denoiser(lora_of_tensors(config, lora), model)
        if any(key.startswith(PEFT_PREFIX) for key in lora):
            raise ValueError("the dict has PEFT's keys, but no lora_alpha: pass config=, its LoraConfig.")
        return _of_diffusers(lora, {}, model)
    if not isinstance(lora, (str, os.PathLike)):
        raise ValueError("this is no LoRA: pass a path, a dict of tensors, a model or a PlainLora.")
    path = Path(lora).expanduser()
    if (path / CONFIG_NAME).is_file():
        return _of_denoiser(_of_folder(path), model)
    file = _file(path)
    tensors, metadata = read_tensors(file)
    parts = _of_diffusers(tensors, metadata or {}, model)
    scheduler = _scheduler(file.parent, (metadata or {}).get(SCHEDULER_KEY))
    own = {name: part for name, part in parts.items() if name in ("", *DENOISERS)}
    return parts | {name: replace(part, scheduler=scheduler) for name, part in own.items()}


def lora_of_tensors(config: LoraConfig, tensors: Mapping[str, Tensor]) -> PlainLora:
    """The LoRA that PEFT makes of `config` and `tensors`, by PEFT's keys.

    Raises:
        ValueError: A and B are not both there, or the configuration contradicts the rank or DoRA.
    """
    own = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in tensors.items()}
    layers = layers_of_tensors(config, own)
    if not layers:
        raise ValueError(f"no LoRA in PEFT's format: it holds {listed(own) or 'no tensors'}.")
    return PlainLora(config, layers, others_of(own))


def _of_denoiser(lora: PlainLora, model: Any) -> dict[str, PlainLora]:
    if not isinstance(model, DiffusionPipeline):
        return {"": lora}
    names = [name for name in DENOISERS if isinstance(getattr(model, name, None), nn.Module)]
    if not names:
        raise ValueError(f"{type(model).__name__} has no {' or '.join(DENOISERS)}: pass the component to adapt.")
    return {names[0]: lora}


def _of_model(model: nn.Module, adapter_name: str) -> PlainLora:
    with adapter_of_model(model, adapter_name) as adapter:
        if any(key is not None for key in adapter.keys.values()):
            raise ValueError(
                f"Adapter '{adapter_name}' depends on λ by its core or its strength: it is a NaRA already. For its "
                "LoRA at one λ pass to_lora(model, noise_level=λ)."
            )
        return assembled(adapter, lambda name: adapter.core(name, None)[0])


def _of_folder(folder: Path) -> PlainLora:
    if is_naras(read_config_file(folder / CONFIG_NAME)):
        raise ValueError(
            "it is a NaRA already: load it by PeftModel.from_pretrained(model, folder) or "
            "pipe.load_nara_weights(folder)."
        )
    config = PeftConfig.from_pretrained(str(folder))
    if type(config) is not LoraConfig:
        raise ValueError(f"it is a {type(config).__name__.removesuffix('Config')}, which is no LoRA.")
    lora = lora_of_tensors(config, read_peft_tensors(folder))
    return replace(lora, scheduler=_scheduler(folder, None))


def _file(path: Path) -> Path:
    found = [path] if path.is_file() else sorted(path.glob("*.safetensors")) if path.is_dir() else []
    named = path / "pytorch_lora_weights.safetensors"
    if named in found or len(found) == 1:
        return named if named in found else found[0]
    raise ValueError(
        f"There is no LoRA file '{path}', nor a folder with {CONFIG_NAME} or one LoRA file: pass the path of a file. A "
        "LoRA on the Hub is downloaded first, by huggingface_hub.snapshot_download(repository)."
    )


def _scheduler(folder: Path, text: str | None) -> dict[str, Any] | None:
    """The scheduler's fields in a file's metadata, or else in its folder; None if there are none."""
    path = folder / SCHEDULER / "scheduler_config.json"
    if text is not None:
        return json.loads(text)
    if not path.is_file():
        return None
    given = read_config_file(path)
    return {name: value for name, value in given.items() if name not in ("_diffusers_version", "_use_default_values")}


# ---------------------------------------------------------------------- by Diffusers' converters


def _of_diffusers(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], model: Any) -> dict[str, PlainLora]:
    """{component: its LoRA} of a file; {"": the LoRA} if `model` is no pipeline."""
    if odd := [key for key in tensors if re.search(r"dora_scale|hada_|lokr_|oft_|lora_mid|glora|\.diff(_b)?$", key)]:
        raise ValueError(
            f"it holds '{odd[0]}', a key of a DoRA in kohya's format or of a LyCORIS method, which Diffusers "
            "doesn't read: convert it to PEFT's format with the program that wrote it, or start from another LoRA."
        )
    state, alphas = _converted(tensors, model)
    components = list(dict.fromkeys(map(_component, state)))
    is_pipeline = isinstance(model, DiffusionPipeline)
    fits = [isinstance(getattr(model, name or "?", None), nn.Module) for name in components]
    if not all(fits) if is_pipeline else len(components) > 1:
        raise ValueError(
            f"it is for {listed(components)}: pass the pipeline that it was trained on, which has them all, "
            f"instead of {type(model).__name__}."
        )
    configs, parts = _configs(metadata), {}
    for component in components:
        own = {key: tensor for key, tensor in state.items() if _component(key) == component}
        values = _by_peft_names(own, alphas, component, model)
        config = configs.get(component, configs.get("")) or _config_of(values)
        found = {key: tensor for key, (tensor, _) in values.items()}
        parts[component if is_pipeline else ""] = lora_of_tensors(config, found)
    down = re.compile(r"(.+?)[._](lora_A|lora_down|lora\.down|lora_linear_layer\.down|lora_embedding_A)(\.weight)?")
    count = len({match[1] for key in tensors if (match := down.fullmatch(key))})
    if sum(len(part.layers) for part in parts.values()) < count:
        raise ValueError(
            f"it has {count} layers, of which Diffusers' converters keep fewer: convert it to PEFT's format with "
            "the program that wrote it."
        )
    return parts


def _component(key: str) -> str:
    first = key.partition(".")[0]
    return first if first in DENOISERS or first.startswith(TEXT_ENCODER) else ""


def _converted(tensors: Mapping[str, Tensor], model: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """{Diffusers' key, with the component: tensor}, and {Diffusers' key of an alpha: alpha}."""
    kind: Any = StableDiffusionXLPipeline if isinstance(model, UNet2DConditionModel) else type(model)
    if not hasattr(kind, "lora_state_dict"):
        return dict(tensors), {}
    unet = model if isinstance(model, UNet2DConditionModel) else getattr(model, "unet", None)
    options = {} if unet is None else {"unet_config": unet.config}
    given = {_kohyas(key) if unet is not None else key: tensor for key, tensor in tensors.items()}
    try:
        found = kind.lora_state_dict(given, **options)
    except (ValueError, KeyError, IndexError, NotImplementedError) as error:
        raise ValueError(f"no LoRA that Diffusers reads for {kind.__name__}: {error}") from error
    state, alphas = found if isinstance(found, tuple) else (found, None)
    return dict(state), {key: float(alpha) for key, alpha in (alphas or {}).items()}


def _kohyas(key: str) -> str:
    """kohya's key, which Diffusers reads, for what `nara fold --form comfyui` writes of a UNet."""
    match = re.fullmatch(r"diffusion_model\.(.+)\.lora_([AB])\.weight", key)
    if match is None:
        return key
    return f"lora_unet_{match[1].replace('.', '_')}.lora_{'down' if match[2] == 'A' else 'up'}.weight"


def _by_peft_names(
    own: Mapping[str, Tensor], alphas: Mapping[str, float], component: str, model: Any
) -> dict[str, tuple[Tensor, float | None]]:
    """{PEFT's key without the component: (tensor, the alpha of its layer, or None)}."""
    new: dict[str, Any] = {}
    old: dict[str, Any] = {}
    for key, tensor in own.items():
        names = (f"{key.split('.lora.')[0]}.alpha", key.replace(".lora_A.weight", ".alpha"), f"{key}.alpha")
        alpha = next((alphas[name] for name in names if name in alphas), None)
        is_pefts = re.search(r"\.lora_(A|B|embedding|magnitude)", key)
        (new if is_pefts else old)[key.removeprefix(f"{component}.")] = (tensor, alpha)
    is_text = component.startswith(TEXT_ENCODER)
    if old:
        new |= convert_state_dict_to_peft(old) if is_text else convert_unet_state_dict_to_peft(old)
    if not is_text:
        return new
    encoder = getattr(model, component, model)
    rename = with_text_model if hasattr(encoder, "text_model") else lambda key: key.removeprefix("text_model.")
    return {rename(key): value for key, value in new.items()}


def _config_of(values: Mapping[str, tuple[Tensor, float | None]]) -> LoraConfig:
    """The configuration of a file that has none: ranks by A, α by its alphas, or the rank, which is a scale of 1."""
    layers = {}
    for key, (A, alpha) in values.items():
        name, is_a, _ = key.partition(".lora_A.")
        if is_a:
            vectors = (values.get(f"{name}.lora_magnitude_vector{ending}") for ending in ("", ".weight"))
            magnitude = next((vector[0] for vector in vectors if vector), None)
            layers[name] = PlainLoraLayer(A, A, alpha or float(len(A)), len(A), magnitude=magnitude)
    if not layers:
        raise ValueError(
            f"no LoRA in PEFT's or Diffusers' format, but {listed(values) or 'nothing'}: for kohya's, "
            "pass the pipeline instead of one of its models."
        )
    return config_of_layers(layers)


def _configs(metadata: Mapping[str, str]) -> dict[str, LoraConfig]:
    """{component: its configuration}, from the metadata that `save_lora_weights` writes."""
    split: dict[str, dict[str, Any]] = {}
    try:
        for key, value in json.loads(metadata.get(LORA_ADAPTER_METADATA_KEY, "{}")).items():
            component, _, name = key.rpartition(".")
            split.setdefault(component, {})[name] = value
        return {component: LoraConfig(**own) for component, own in split.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"the configuration in its metadata can't be read: {error}") from error
