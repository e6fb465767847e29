"""A NaRA that starts as a given LoRA: its A, B and magnitudes, and a core with C(λ) = I."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.utils import CONFIG_NAME
from torch import Tensor, nn

from nara_diffusion.loaders.schedulers import DENOISERS
from nara_diffusion.loaders.source import read_file
from nara_diffusion.loaders.validation import TEXT_ENCODER, base_modules
from nara_diffusion.noise.signals import NoiseSignals
from nara_diffusion.tuner.config import NaraConfig
from nara_diffusion.tuner.config_files import is_naras, read_config_file
from nara_diffusion.tuner.injection import roll_back
from nara_diffusion.tuner.peft_patches import trainable_again

from .adapted_layers import read_adapter
from .diffusers_files import read_diffusers
from .filling import fill
from .fold import to_lora
from .lora_config import fitting_config
from .lora_tensors import lora_of_tensors
from .plain_lora import PEFT_PREFIX, PlainLora

_DECIDED = {
    "r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
    "lora_bias", "fan_in_fan_out", "layers_to_transform", "layers_pattern", "modules_to_save", "strength",
}  # fmt: skip
"""Fields that the LoRA decides, or by which the NaRA would not start as it."""
_STARTS_ANYWAY = ("gaussian", "orthogonal", "eva", "mica")
"""Starts of A and B that the LoRA's own tensors take the place of, and that leave the base as it is."""
_LEVELS = (0.0, 0.2, 0.5, 0.7, 1.0)


def from_lora(
    lora: Any,
    model: Any,
    adapter_name: str = "default",
    *,
    config: LoraConfig | None = None,
    source_adapter: str = "default",
    **core: Any,
) -> Any:
    """`model` with a NaRA that is the given LoRA (or DoRA) at step 0: the same tensors bit by bit, and C(λ) = I.

        model = from_lora("folder of a PEFT LoRA", backbone, core_type="hypernetwork")
        from_lora("pytorch_lora_weights.safetensors", pipe)              # then pipe.save_nara_weights(…)

    Args:
        lora: a folder in PEFT's format; a file, or a folder with one, that Diffusers reads (its own names, kohya's, …);
            a dict of such tensors; a PeftModel or another model with a LoRA; or a `PlainLora`.
        model: the base: a module, which a PeftModel is put around; a Diffusers model, into which the adapter is
            injected; or a pipeline, whose text encoders get their part as plain LoRAs (core_type "identity").
        adapter_name: of the new adapter.
        config: the LoraConfig of a dict in PEFT's format, whose α no tensor tells.
        source_adapter: which adapter, where `lora` is a model.
        core: fields of NaraConfig, such as core_type, core_sharing, noise_convention, lora_dropout.

    Returns:
        A PeftModel, or the Diffusers model or pipeline itself. The adapter is active and trainable.

    Raises:
        ValueError: no LoRA that is read here; a layer of it that has no place, or another shape; a field of `core` that
            the LoRA decides; a core that is not I at first (core_init "kaiming", "rank_mask", "bins"). `model` is as it
            was.
    """
    decided = sorted(_DECIDED & core.keys())
    if decided:
        raise ValueError(f"{', '.join(decided)}: the LoRA decides that, so leave it out, or train a new adapter.")
    parts, origin = read_lora(lora, model, config=config, source_adapter=source_adapter)
    if not isinstance(model, DiffusionPipeline):
        return _insert(parts[""], model, adapter_name, core, origin, inject=isinstance(model, PeftAdapterMixin))
    with ExitStack() as undo:
        for component, part in parts.items():
            own = {"core_type": "identity"} if component.startswith(TEXT_ENCODER) else core
            target = getattr(model, component)
            undo.enter_context(trainable_again(target))
            _insert(part, target, adapter_name, own, origin, inject=True)
            undo.enter_context(_rolled_back_on_error(target, adapter_name))
    return model


@contextmanager
def _rolled_back_on_error(root: Any, adapter_name: str) -> Iterator[None]:
    try:
        yield
    except BaseException:
        roll_back(root, adapter_name)
        if not hasattr(root, "peft_config"):
            del root._hf_peft_config_loaded
        raise


def read_lora(
    lora: Any, model: Any, *, config: LoraConfig | None = None, source_adapter: str = "default"
) -> tuple[dict[str, PlainLora], str]:
    """Component → LoRA (under an empty name where `model` is no pipeline), and what to call the source in messages.

    Raises:
        ValueError: see `from_lora`.
    """
    if isinstance(lora, PlainLora):
        return _of_denoiser(lora, model), "The LoRA"
    if isinstance(lora, nn.Module):
        return _of_denoiser(_of_model(lora, source_adapter), model), f"The LoRA of {type(lora).__name__}"
    if isinstance(lora, Mapping):
        if config is not None:
            return _of_denoiser(lora_of_tensors(config, _without_prefix(lora), "The dict"), model), "The dict"
        if any(key.startswith(PEFT_PREFIX) for key in lora):
            raise ValueError("The dict has PEFT's names, but no tensor tells α: pass config=, its LoraConfig.")
        return read_diffusers(lora, None, model, "The dict"), "The dict"
    if not isinstance(lora, (str, os.PathLike)):
        raise ValueError(f"lora is a {type(lora).__name__}: pass a path, a dict of tensors, a model or a PlainLora.")
    path = Path(lora).expanduser()
    if (path / CONFIG_NAME).is_file():
        return _of_denoiser(_of_folder(path), model), f"'{path}'"
    file = _file(path)
    tensors, metadata = read_file(file)
    return read_diffusers(tensors, metadata, model, f"'{file}'"), f"'{file}'"


def _of_denoiser(lora: PlainLora, model: Any) -> dict[str, PlainLora]:
    if not isinstance(model, DiffusionPipeline):
        return {"": lora}
    names = [name for name in DENOISERS if isinstance(getattr(model, name, None), nn.Module)]
    if not names:
        raise ValueError(f"{type(model).__name__} has none of {', '.join(DENOISERS)}: pass the module that is meant.")
    return {names[0]: lora}


def _of_model(model: nn.Module, adapter_name: str) -> PlainLora:
    with read_adapter(model, adapter_name) as adapter:
        if any(layer.key is not None for layer in adapter.layers):
            raise ValueError(
                f"Adapter '{adapter_name}' has cores, or a strength that depends on λ: it is a NaRA already. For the "
                "LoRA of one λ pass to_lora(model, noise_level=λ)."
            )
    return to_lora(model, adapter_name=adapter_name)


def _of_folder(folder: Path) -> PlainLora:
    origin = f"'{folder}'"
    if is_naras(read_config_file(folder / CONFIG_NAME), origin):
        raise ValueError(
            f"{origin} is a NaRA already: load it by PeftModel.from_pretrained(model, folder), or "
            "pipe.load_nara_weights(folder)."
        )
    config = PeftConfig.from_pretrained(str(folder))
    if type(config) is not LoraConfig:
        raise ValueError(f"{origin} is a {type(config).__name__.removesuffix('Config')}, which is no LoRA.")
    return lora_of_tensors(config, _without_prefix(load_peft_weights(str(folder), device="cpu")), origin)


def _without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in tensors.items()}


def _file(path: Path) -> Path:
    if path.is_file():
        return path
    found = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    named = path / "pytorch_lora_weights.safetensors"
    if named in found or len(found) == 1:
        return named if named in found else found[0]
    if path.is_dir():
        names = ", ".join(repr(file.name) for file in found[:4]) or "no safetensors file"
        raise ValueError(f"'{path}' has neither {CONFIG_NAME} nor one LoRA file, but {names}: pass the file's path.")
    raise ValueError(
        f"There is no file or folder '{path}'. A LoRA on the Hub is downloaded first: "
        "huggingface_hub.snapshot_download(repository)."
    )


# ---------------------------------------------------------------------- into the model


def _insert(
    lora: PlainLora, model: Any, adapter_name: str, core: Mapping[str, Any], origin: str, *, inject: bool
) -> Any:
    """`model` with the adapter, or as it was. `inject`: without a PeftModel around it."""
    root = model.get_base_model() if isinstance(model, PeftModel) else model
    if adapter_name in getattr(root, "peft_config", {}):
        raise ValueError(
            f"{type(root).__name__} has an adapter '{adapter_name}' already: choose another adapter_name, or take that "
            "one off first (unload())."
        )
    check_modules(root, lora, origin)
    config = nara_config(lora, root, core)
    with trainable_again(root):
        return _insert_as(config, lora, model, root, adapter_name, origin, inject)


def _insert_as(
    config: NaraConfig, lora: PlainLora, model: Any, root: Any, adapter_name: str, origin: str, inject: bool
) -> Any:
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config)
        model.set_adapter(adapter_name)
    elif inject:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")  # several are meant
            inject_adapter_in_model(config, model, adapter_name)
    else:
        model = get_peft_model(model, config, adapter_name)
    try:
        fill(root, adapter_name, lora, origin)
        _set_others(model, adapter_name, lora, origin)
        check_identity(root, adapter_name, config)
    except Exception:
        roll_back(root, adapter_name)
        raise
    if inject:
        root._hf_peft_config_loaded = True  # by this Diffusers and Transformers know that there are adapters
    return model


def nara_config(lora: PlainLora, root: nn.Module, core: Mapping[str, Any]) -> NaraConfig:
    """The configuration of a NaRA on the layers of `lora`, with its ranks and scales.

    Raises:
        ValueError: as NaraConfig; or the LoRA's start has changed the base in a way that a NaRA doesn't know.
    """
    plain = fitting_config(lora.config, root, {name: layer.rank for name, layer in lora.layers.items()})
    given = {
        field.name: copy.copy(getattr(plain, field.name))
        for field in fields(LoraConfig)
        if field.init and field.name not in ("peft_type", "auto_mapping", "inference_mode")
    }
    start = given["init_lora_weights"]
    if not isinstance(start, str) or start.lower() in _STARTS_ANYWAY:
        given["init_lora_weights"] = True
    return NaraConfig(**given | dict(core))


def check_modules(root: nn.Module, lora: PlainLora, origin: str) -> None:
    """Raises ValueError if `root` lacks a module that the LoRA adapts."""
    modules = {name for name, _ in base_modules(root)}
    unknown = sorted(lora.layers.keys() - modules)
    if unknown:
        shown = ", ".join(map(repr, unknown[:3]))
        raise ValueError(
            f"{origin} adapts {len(lora.layers)} modules, of which {type(root).__name__} lacks {len(unknown)}: {shown}"
            ". It was trained on another base model, or is for another part of the pipeline."
        )


def _set_others(model: Any, adapter_name: str, lora: PlainLora, origin: str) -> None:
    """Trained biases, tokens and whole modules, which PEFT knows how to set."""
    if not lora.others:
        return
    prefix = PEFT_PREFIX if isinstance(model, PeftModel) else ""
    held = get_peft_model_state_dict(model, model.state_dict(), adapter_name, save_embedding_layers=False)
    others = {f"{prefix}{key}": tensor for key, tensor in lora.others.items()}
    unknown = sorted(others.keys() - held.keys())
    if unknown:
        raise ValueError(f"{origin} holds '{unknown[0]}', which is no tensor of such an adapter: damaged.")
    set_peft_model_state_dict(model, held | others, adapter_name=adapter_name)


def check_identity(root: nn.Module, adapter_name: str, config: NaraConfig) -> None:
    """Raises ValueError if C(λ) is not I."""
    level = torch.tensor(_LEVELS)
    with read_adapter(root, adapter_name) as adapter:
        for layer in adapter.layers:
            core = adapter.core(layer, NoiseSignals(level, level))
            if not torch.equal(core, torch.eye(layer.rank).expand(len(core), -1, -1)):
                raise ValueError(
                    f"core_type {config.core_type!r} (core_init {config.core_init!r}) has a C that is not I at first, "
                    'so that the NaRA would start as another update than the LoRA: choose "hypernetwork", "constant" '
                    'or "knots" with core_init "zero_last", or "identity".'
                )
