"""The three methods that every Diffusers pipeline gets: load, save and unload a NaRA adapter."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from copy import copy
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nara_diffusion.config import NaraConfig
from nara_diffusion.tuner.injection import restored_on_error

from .adapter_part import AdapterPart
from .file import AdapterFile, naming
from .insertion import (
    TEXT_ENCODER,
    adapters_of,
    check_not_wrapped,
    check_storable,
    check_swappable,
    insert,
    nara_adapters_of,
    offloading_suspended,
    part_of,
    prepare_for_hotswap,
    prepare_swap,
    remove,
    unwrapped,
)
from .schedulers import DENOISERS, check_schedulers, denoiser_name, read_schedule_of
from .tensor_files import WEIGHTS_NAME


def load_nara_weights(
    self: Any,
    pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | Mapping[str, Tensor],
    adapter_name: str | None = None,
    hotswap: bool = False,
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    force_download: bool = False,
    proxies: dict[str, str] | None = None,
    local_files_only: bool | None = None,
    use_safetensors: bool | None = None,
    low_cpu_mem_usage: bool = True,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Load a NaRA adapter into the denoiser, and its part for text encoders, if there is one, into those.

    All of it is loaded, or the pipeline is unchanged. Afterwards `set_adapters`, `delete_adapters`, `disable_lora`,
    `unload_lora_weights`, … work as for a LoRA; λ is read from the timestep of each step.

    Args:
        pretrained_model_name_or_path_or_dict: the file that `save_nara_weights` wrote, its folder or a repository on
            the hub; a folder or repository in PEFT's form, as `PeftModel.save_pretrained` and train_scripts/dllm.py
            write it, for the denoiser; or a dict of tensors, with the file's `metadata`.
        adapter_name: its name; None takes "default_0", "default_1", ….
        hotswap: replace the weights of the adapter of that name in place, so that a compiled model is not recompiled.
            Its ranks have to be those of the adapter there. For another lora_alpha without recompilation call
            `enable_lora_hotswap(target_rank=r)`, with their rank, before the first load.
        weight_name: the file's name in its folder, "pytorch_nara_weights.safetensors" unless given.
        subfolder: as for `load_lora_weights`, like the six that follow.
        revision: of a repository on the Hub.
        token: for private repositories.
        cache_dir: where downloads are kept.
        force_download: even if the file is there.
        proxies: protocol → URL.
        local_files_only: never download.
        use_safetensors: None or True; other formats are not read.
        low_cpu_mem_usage: skip the initialisation of weights that the load replaces.
        metadata: of a dict of tensors: `safe_open(file, "pt").metadata()`.

    Raises:
        ValueError: the pipeline has no denoiser; the file is missing, damaged or of another kind (a LoRA); the adapter
            is for another base model, another definition of λ or another prediction; or the name is a duplicate. The
            pipeline is unchanged.
        OSError: the hub's error.
    """
    if use_safetensors is False:
        raise ValueError(
            "NaRA adapters are read from safetensors files only: leave use_safetensors out."
        )
    models = adaptable_models(self)
    hub = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "force_download": force_download,
        "proxies": proxies,
        "local_files_only": local_files_only,
    }
    source = pretrained_model_name_or_path_or_dict
    file = AdapterFile.read(
        source,
        denoiser_name(self),
        weight_name=weight_name,
        subfolder=subfolder,
        metadata=metadata,
        hub=hub,
    )
    parts = file.parts
    with naming(source):
        if unknown := [name for name in parts if name not in models]:
            has = ", ".join(map(repr, models))
            raise ValueError(
                f"it has a part for '{unknown[0]}', but this pipeline has {has}: load it into its own."
            )
        for name, part in parts.items():
            check_not_wrapped(models[name], name, "load_nara_weights")
            check_storable(part.config, name)
        adapter_name = _name_to_load(models, adapter_name, hotswap)
        check_schedulers(self, parts)
        with offloading_suspended(self):
            if hotswap:
                for name, model in models.items():
                    check_swappable(model, name, adapter_name, parts.get(name))
                swaps = [
                    prepare_swap(models[name], adapter_name, part) for name, part in parts.items()
                ]
                for write in swaps:
                    write()
            else:
                _insert_all(models, parts, adapter_name, low_cpu_mem_usage)
    read_schedule_of(self)


def save_nara_weights(
    self: Any,
    save_directory: str | os.PathLike[str],
    adapter_name: str | None = None,
    *,
    is_main_process: bool = True,
    weight_name: str | None = None,
    save_function: Callable[..., Any] | None = None,
    safe_serialization: bool = True,
) -> None:
    """Save one NaRA adapter, of all components, to one file, whole or not at all.

    Components that PEFT has wrapped (`pipe.unet = get_peft_model(pipe.unet, …)`) are included.

    Args:
        save_directory: the folder; it is created if it does not exist.
        adapter_name: of the adapter; None takes "default", or the only adapter.
        is_main_process: False writes nothing, for all but one of several processes.
        weight_name: the file's name, "pytorch_nara_weights.safetensors" unless given.
        save_function: called as save_function(tensors, path, metadata=…) in place of safetensors' `save_file`.
        safe_serialization: True; other formats are not written.

    Raises:
        ValueError: there is no such adapter; it is in a component that the file can't hold, such as a ControlNet;
            or `weight_name` does not end in .safetensors.
    """
    if not safe_serialization:
        raise ValueError(
            "NaRA adapters are saved as safetensors only: leave safe_serialization out."
        )
    models = {component: unwrapped(model) for component, model in adaptable_models(self).items()}
    name = _name_to_save(models, adapter_name)
    others = {
        key: part
        for key, part in self.components.items()
        if isinstance(part, nn.Module) and key not in models
    }
    if left_out := [
        key for key, part in others.items() if name in nara_adapters_of(unwrapped(part))
    ]:
        raise ValueError(
            f"Adapter '{name}' is in {', '.join(map(repr, left_out))} too, which a pipeline's file has no place for: "
            f"save that part by peft.PeftModel, or remove it first, pipe.{left_out[0]}.delete_adapters('{name}')."
        )
    weight_name, folder = WEIGHTS_NAME if weight_name is None else weight_name, Path(save_directory)
    if not weight_name.endswith(".safetensors") or Path(weight_name).name != weight_name:
        raise ValueError(
            f"weight_name is {weight_name!r}: pass the name of a .safetensors file, without a folder."
        )
    with offloading_suspended(self):
        file = AdapterFile(
            {
                c: _part_to_save(self, m, c, name)
                for c, m in models.items()
                if name in adapters_of(m)
            }
        )
        if not is_main_process:
            return
        folder.mkdir(parents=True, exist_ok=True)
        file.save(folder / weight_name, save_function)


def unload_nara_weights(self: Any) -> None:
    """Remove all NaRA adapters of the pipeline. LoRAs stay as they are.

    Fused weights stay fused, as with a LoRA: call `unfuse_lora` first.
    """
    models = {
        name: model for name, model in adaptable_models(self).items() if nara_adapters_of(model)
    }
    for component, model in models.items():
        check_not_wrapped(model, component, "unload_nara_weights")
    with offloading_suspended(self):
        for model in models.values():
            remove(model, list(nara_adapters_of(model)))


# ---------------------------------------------------------------------- components


def adaptable_models(pipe: Any) -> dict[str, nn.Module]:
    """Component → model, the denoiser first, for all components that an adapter may have a part for.

    Raises:
        ValueError: the pipeline has no denoiser.
    """
    denoiser_name(pipe)
    names = [name for name in pipe.components if name in DENOISERS or name.startswith(TEXT_ENCODER)]
    found = {
        name: getattr(pipe, name) for name in sorted(names, key=lambda name: name not in DENOISERS)
    }
    originals = {
        name: getattr(model, "_orig_mod", model) for name, model in found.items()
    }  # of torch.compile
    return {name: model for name, model in originals.items() if isinstance(model, nn.Module)}


def _insert_all(
    models: Mapping[str, nn.Module],
    parts: Mapping[str, AdapterPart],
    name: str,
    low_cpu_mem_usage: bool,
) -> None:
    """Insert the parts into all components, or, after an error, into none."""
    with ExitStack() as undo:
        for component, model in models.items():
            if component in parts:
                undo.enter_context(restored_on_error(model))
                try:
                    insert(model, name, parts[component], low_cpu_mem_usage)
                except ValueError as error:
                    raise ValueError(f"{component}: {error}") from error
                prepare_for_hotswap(model)


# ---------------------------------------------------------------------- names


def _name_to_load(models: Mapping[str, nn.Module], name: str | None, hotswap: bool) -> str:
    """The name that an adapter is loaded under: `name`, or the first free default_N."""
    existing = sorted({name for model in models.values() for name in adapters_of(model)})
    if hotswap and name not in existing:
        raise ValueError(
            f"hotswap=True replaces an adapter that is there, but adapter_name is {name!r} and the pipeline has "
            f"{', '.join(map(repr, existing)) or 'none'}: name one of them, or leave hotswap out."
        )
    if name is None:
        number = len(adapters_of(next(iter(models.values()))))
        return next(free for i in range(1000) if (free := f"default_{number + i}") not in existing)
    if name in existing and not hotswap:
        raise ValueError(
            f"adapter_name '{name}' is a duplicate, since the pipeline has an adapter of that name: choose "
            f"another name, delete the other adapter by pipe.delete_adapters('{name}'), or replace it by hotswap=True."
        )
    return name


def _name_to_save(models: Mapping[str, nn.Module], name: str | None) -> str:
    """The name of the adapter to save: `name`; if None, that of the only NaRA, or else "default"."""
    there = list(
        dict.fromkeys(name for model in models.values() for name in nara_adapters_of(model))
    )
    wanted = name or (there[0] if len(there) == 1 else "default")
    if wanted not in there:
        others = {other for model in models.values() for other in adapters_of(model)}
        hint = f" '{wanted}' is a LoRA: save it by save_lora_weights." if wanted in others else ""
        raise ValueError(
            f"There is no NaRA adapter '{wanted}' to save: the pipeline has "
            f"{', '.join(map(repr, there)) or 'none'}.{hint}"
        )
    return wanted


# ---------------------------------------------------------------------- saving


def _part_to_save(pipe: Any, model: nn.Module, component: str, name: str) -> AdapterPart:
    config = adapters_of(model)[name]
    if not isinstance(config, NaraConfig):
        raise ValueError(
            f"'{name}' of {component} is a plain LoRA, which a NaRA's file cannot hold: add it by "
            'NaraConfig(core_type="identity", …), which is the same.'
        )
    check_storable(config, component)
    config = copy(config)  # the model keeps its own
    base = getattr(pipe, "name_or_path", None) or config.base_model_name_or_path
    config.base_model_name_or_path = Path(base).name if base and Path(base).exists() else base
    return AdapterPart(config, part_of(model, name).tensors)
