"""Reading a LoRA: a folder of PEFT, or, for a pipeline, a file that Diffusers reads.

Files are converted by `lora_state_dict` of the pipeline (Diffusers' own names, kohya's, …). What that drops with a
warning or without one is an error here: keys of DoRA in kohya's files, and layers that match no module.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME
from torch import Tensor, nn

from nara_diffusion.loaders.insertion import TEXT_ENCODER
from nara_diffusion.loaders.schedulers import DENOISERS, denoiser_name
from nara_diffusion.loaders.tensor_files import (
    is_nara,
    read_config_file,
    read_peft_tensors,
    read_tensors,
)
from nara_diffusion.strict import PEFT_PREFIX
from nara_diffusion.utils.naming import listed

from .host_files import with_text_model
from .plain_lora import PlainLora, layers_of_tensors, others_of


def read_lora(lora: str | os.PathLike[str], model: Any) -> tuple[dict[str, PlainLora], str]:
    """{component: its LoRA} ({"": the LoRA} if `model` is no pipeline), and the name of the source in messages.

    Raises:
        ValueError: see `from_lora`.
    """
    path, origin = Path(lora).expanduser(), f"'{lora}'"
    try:
        if (path / CONFIG_NAME).is_file():
            parts = {denoiser_name(model) if is_pipeline(model) else "": _of_folder(path)}
        else:
            parts = _of_file(_found(path), model)
        for part in parts.values():
            if part.others or part.config.lora_bias:
                extra = next(iter(part.others), "biases of B")
                raise ValueError(
                    f"it has trained '{extra}' beside a LoRA's factors, which a NaRA can't start from."
                )
        return parts, origin
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error


def is_pipeline(model: Any) -> bool:
    """Whether `model` is a pipeline of Diffusers, of which this imports the base class."""
    return isinstance(model, diffusers.DiffusionPipeline)  # type: ignore[attr-defined]


def _scheduler(folder: Path, text: str | None = None) -> dict[str, Any] | None:
    """The fields that an earlier version wrote into a file's metadata, or into its folder; None if there are none."""
    path = folder / "scheduler" / "scheduler_config.json"
    given = json.loads(text) if text else read_config_file(path) if path.is_file() else {}
    fields = {
        name: value
        for name, value in given.items()
        if name not in ("_diffusers_version", "_use_default_values")
    }
    return fields or None


def _of_folder(folder: Path) -> PlainLora:
    if is_nara(folder):
        raise ValueError(
            "it is a NaRA already: load it by PeftModel.from_pretrained(model, folder) or "
            "pipe.load_nara_weights(folder)."
        )
    config = PeftConfig.from_pretrained(str(folder))
    if type(config) is not LoraConfig:
        raise ValueError(
            f"it is a {type(config).__name__.removesuffix('Config')}, which is no LoRA."
        )
    return replace(_of_tensors(config, read_peft_tensors(folder)), scheduler=_scheduler(folder))


def _of_tensors(config: LoraConfig, tensors: Mapping[str, Tensor]) -> PlainLora:
    own = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in tensors.items()}
    layers = layers_of_tensors(config, own)
    if not layers:
        raise ValueError(f"no LoRA in PEFT's format: it holds {listed(own) or 'no tensors'}.")
    return PlainLora(config, layers, others_of(own))


# ---------------------------------------------------------------------- by Diffusers' converters


def _of_file(path: Path, pipe: Any) -> dict[str, PlainLora]:
    """{component: its LoRA}."""
    tensors, metadata = read_tensors(path)
    scheduler = _scheduler(path.parent, (metadata or {}).get("nara_scheduler"))
    if not is_pipeline(pipe):
        raise ValueError(
            "it isn't in PEFT's form, which has an adapter_config.json: name such a folder. A file of another form is "
            f"read for a pipeline: pass the pipeline, instead of {type(pipe).__name__}."
        )
    if odd := [
        key
        for key in tensors
        if re.search(r"dora_scale|hada_|lokr_|oft_|lora_mid|glora|\.diff(_b)?$", key)
    ]:
        raise ValueError(
            f"it holds '{odd[0]}', a key of a DoRA in kohya's format or of a LyCORIS method, which Diffusers "
            "doesn't read: convert it to PEFT's format with the program that wrote it, or start from another LoRA."
        )
    state, alphas = _converted(tensors, pipe)
    configs, parts = _configs(metadata or {}), {}
    for component in dict.fromkeys(key.partition(".")[0] for key in state):
        if not isinstance(getattr(pipe, component, None), nn.Module):
            raise ValueError(
                f"it is for '{component}', which {type(pipe).__name__} lacks: pass the pipeline it is for."
            )
        own = {key: tensor for key, tensor in state.items() if key.startswith(f"{component}.")}
        values = _by_peft_names(own, alphas, component, pipe)
        found = _of_tensors(
            configs.get(component) or _config_of(values),
            {key: value[0] for key, value in values.items()},
        )
        parts[component] = replace(found, scheduler=scheduler if component in DENOISERS else None)
    down = re.compile(
        r"(.+?)[._](lora_A|lora_down|lora\.down|lora_linear_layer\.down|lora_embedding_A)(\.weight)?"
    )
    count = len({match[1] for key in tensors if (match := down.fullmatch(key))})
    if sum(len(part.layers) for part in parts.values()) < count or not parts:
        raise ValueError(
            f"it has {count} layers of a LoRA, of which Diffusers' converters keep fewer: convert it to PEFT's format "
            "with the program that wrote it."
        )
    return parts


def _found(path: Path) -> Path:
    found = (
        [path] if path.is_file() else sorted(path.glob("*.safetensors")) if path.is_dir() else []
    )
    named = path / "pytorch_lora_weights.safetensors"
    if named in found or len(found) == 1:
        return named if named in found else found[0]
    raise ValueError(
        f"There is no LoRA file '{path}', nor a folder with {CONFIG_NAME} or one LoRA file: pass the path of a file. A "
        "LoRA on the Hub is downloaded first, by huggingface_hub.snapshot_download(repository)."
    )


def _converted(
    tensors: Mapping[str, Tensor], pipe: Any
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """{Diffusers' key, with the component: tensor}, and {Diffusers' key of an alpha: alpha}."""
    options = {"unet_config": pipe.unet.config} if hasattr(pipe, "unet") else {}
    # ComfyUI's names of a UNet, as `nara fold --form comfyui` writes them, as kohya's
    of_unet = (
        re.compile(r"diffusion_model\.(.+)\.lora_([AB])\.weight")
        if options
        else re.compile(r"(?!)")
    )
    given = {}
    for key, tensor in tensors.items():
        match = of_unet.fullmatch(key)
        kind = "down" if match and match[2] == "A" else "up"
        given[f"lora_unet_{match[1].replace('.', '_')}.lora_{kind}.weight" if match else key] = (
            tensor
        )
    try:
        found = pipe.lora_state_dict(given, **options)
    except (AttributeError, ValueError, KeyError, IndexError, NotImplementedError) as error:
        raise ValueError(
            f"no LoRA that Diffusers reads for {type(pipe).__name__}: {error}"
        ) from error
    state, alphas = found if isinstance(found, tuple) else (found, None)
    return dict(state), {key: float(alpha) for key, alpha in (alphas or {}).items()}


def _by_peft_names(
    own: Mapping[str, Tensor], alphas: Mapping[str, float], component: str, pipe: Any
) -> dict[str, tuple[Tensor, float | None]]:
    """{PEFT's key without the component: (tensor, the alpha of its layer, or None)}."""
    new: dict[str, Any] = {}
    old: dict[str, Any] = {}
    for key, tensor in own.items():
        names = (
            f"{key.split('.lora.')[0]}.alpha",
            key.replace(".lora_A.weight", ".alpha"),
            f"{key}.alpha",
        )
        alpha = next((alphas[name] for name in names if name in alphas), None)
        is_pefts = re.search(r"\.lora_(A|B|embedding|magnitude)", key)
        (new if is_pefts else old)[key.removeprefix(f"{component}.")] = (tensor, alpha)
    if not component.startswith(TEXT_ENCODER):
        return new | (convert_unet_state_dict_to_peft(old) if old else {})
    new |= convert_state_dict_to_peft(old) if old else {}
    has_part = hasattr(getattr(pipe, component), "text_model")
    rename = with_text_model if has_part else lambda key: key.removeprefix("text_model.")
    return {rename(key): value for key, value in new.items()}


def _config_of(values: Mapping[str, tuple[Tensor, float | None]]) -> LoraConfig:
    """The configuration of a file that has none, which names each module in full: ranks by A, α by the file's alphas,
    or the rank, which is a scale of 1."""
    given = {
        key.partition(".lora_A.")[0]: value for key, value in values.items() if ".lora_A." in key
    }
    if not given:
        raise ValueError(
            f"no LoRA in PEFT's or Diffusers' format, but {listed(values) or 'nothing'}."
        )
    ranks = {name: len(A) for name, (A, _) in given.items()}
    alphas = {name: alpha or float(len(A)) for name, (A, alpha) in given.items()}
    r, most = (
        Counter(ranks.values()).most_common(1)[0][0],
        Counter(alphas.values()).most_common(1)[0][0],
    )
    return LoraConfig(
        r=r,
        lora_alpha=most,  # type: ignore[arg-type]
        use_dora=any(".lora_magnitude_vector" in key for key in values),
        inference_mode=True,
        target_modules="|".join(
            map(re.escape, sorted(given))
        ),  # in a list, a name is the end of others too
        rank_pattern={f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != r},
        alpha_pattern={
            f"^{re.escape(name)}": alpha for name, alpha in alphas.items() if alpha != most
        },
    )


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
