"""Define the pipeline methods that load, save and unload NaRA adapters in Diffusers."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from nara_diffusion.config import NaraConfig
from nara_diffusion.noise.level import NoiseWindow
from nara_diffusion.tuner.adding import restored_on_error
from nara_diffusion.utils.wording import listed

from .adapter_part import AdapterPart
from .components import (
    Pipeline,
    adaptable_models,
    adapters_of,
    check_not_wrapped,
    check_storable,
    denoiser_name,
    follow_scheduler,
    nara_adapters_of,
    part_of,
    tuner_layers,
    unwrapped,
)
from .file import AdapterFile, Source, naming
from .insertion import (
    REQUEST,
    check_swappable,
    insert,
    offloading_suspended,
    prepare_for_hotswap,
    prepare_swap,
    remove,
)
from .tensor_files import WEIGHTS_NAME
from .windows import checked_windows, is_lora, load_lora_inside, parts_inside, restrict


def load_nara_weights(
    self: Pipeline,
    pretrained_model_name_or_path_or_dict: Source
    | list[tuple[str | os.PathLike[str], tuple[float, float]]],
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
    rank_mask: Mapping[str, float] | None = None,
) -> None:
    """Load a NaRA adapter into the denoiser and into any text encoders that it has parts for.

    A T-LoRA of LyCORIS, SimpleTuner or its authors' code is loaded into the denoiser as a NaRA with
    core_type "rank_mask". Its format is recognised by the keys of its tensors.

    The adapter is loaded completely, or the pipeline is unchanged. Afterwards, `set_adapters`,
    `delete_adapters`, `disable_lora`, `unload_lora_weights` and others work as for a LoRA. λ is
    read from the timestep of each step.

    Args:
        pretrained_model_name_or_path_or_dict: a file that `save_nara_weights` wrote, its folder, or
            a repository on the Hub. For the denoiser, it may also be a folder or repository in
            PEFT's format, as written by `PeftModel.save_pretrained` and train_scripts/dllm.py. Or a
            dict of tensors, together with `metadata`. Or a list of pairs (file, (low, high)) of NaRAs
            and LoRAs, each on only where low ≤ λ < high (see `windows`).
        adapter_name: the adapter's name. None means the first free "default_0", "default_1", …. For
            several adapters, from a list or from one file, it is followed by "_0", "_1", ….
        hotswap: whether to replace the weights of the adapter with this name in place, so that a
            compiled model is not recompiled. Both adapters need the same ranks r. If lora_alpha
            differs, call `enable_lora_hotswap(target_rank=r)` before the first load.
        weight_name: the file's name in its folder. None means "pytorch_nara_weights.safetensors".
        subfolder: as for `load_lora_weights`, like the next six arguments.
        revision: the revision of a repository on the Hub.
        token: the token for private repositories.
        cache_dir: the folder for downloads.
        force_download: whether to download even if the file is in the cache.
        proxies: the URL of the proxy for each protocol.
        local_files_only: whether to use only local files and never download.
        use_safetensors: None or True; other formats are not read.
        low_cpu_mem_usage: whether to skip initialising weights that will be replaced.
        metadata: the metadata for a dict of tensors, from `safe_open(file, "pt").metadata()`.
        rank_mask: {"min": r_min, "exponent": a} of a T-LoRA's mask. None means those in the
            lycoris_config.json beside the file, or 1 and 1 with a warning.

    Raises:
        ValueError: the pipeline has no denoiser; the file is missing, damaged or of another kind
            (such as a LoRA); the adapter is for another base model or another definition of
            λ; or the name is already in use. The pipeline is unchanged.
        OSError: the download from the Hub failed.
    """
    if use_safetensors is False:
        raise ValueError(
            "Adapters are read from safetensors files only. Leave use_safetensors out."
        )
    source = pretrained_model_name_or_path_or_dict
    if metadata is not None and not isinstance(source, Mapping):
        raise ValueError(
            "metadata is for a dict of tensors. A file contains its own: leave it out."
        )
    place: dict[str, Any] = {
        "weight_name": weight_name,
        "subfolder": subfolder,
        "hub": {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "force_download": force_download,
            "proxies": proxies,
            "local_files_only": local_files_only,
        },
    }
    models = adaptable_models(self)

    def base(component: str) -> nn.Module:
        check_not_wrapped(models[component], component, "load_nara_weights")
        if fused := getattr(self, "fused_loras", None):
            raise ValueError(
                f"{listed(fused)} is fused into the base, but the adapter's start factors come from the original "
                "weights. Call pipe.unfuse_lora() first."
            )
        return models[component]

    def read(path: Source, component: str) -> AdapterFile:
        return AdapterFile.read(
            path,
            component,
            metadata=metadata,
            for_model=True,
            base=partial(base, component),
            rank_mask=rank_mask,
            **place,
        )

    def insert_parts(parts: Mapping[str, AdapterPart], name: str) -> None:
        _check_parts(parts, models)
        for component, part in parts.items():
            model = models[component]
            try:
                insert(model, name, part, low_cpu_mem_usage)
            except ValueError as error:
                raise ValueError(f"{component}: {error}") from error
            if request := getattr(model, REQUEST, None):
                prepare_for_hotswap(model, request)

    def insert_inside(window: NoiseWindow, path: str, name: str) -> None:
        with naming(path):
            if is_lora(path, **place):
                load_lora_inside(self, window, path, name, **place)
            else:
                insert_parts(parts_inside(self, window, partial(read, path)), name)
            restrict(models, name, window)

    with offloading_suspended(self), restored_on_error(*models.values()):
        if isinstance(source, list):
            windows = checked_windows(source)
            names = _names_to_load(models, adapter_name, hotswap, len(windows), is_list=True)
            for name, (path, window) in zip(names, windows, strict=True):
                insert_inside(window, path, name)
        else:
            adapters = read(source, denoiser_name(self)).adapters
            with naming(source):
                names = _names_to_load(models, adapter_name, hotswap, len(adapters))
                for name, parts in zip(names, adapters, strict=True):
                    if hotswap:
                        _swap(models, parts, name)
                    else:
                        insert_parts(parts, name)
        if not hotswap:
            _activate(models, names)
    follow_scheduler(self)


def save_nara_weights(
    self: Pipeline,
    save_directory: str | os.PathLike[str],
    adapter_name: str | list[str] | None = None,
    *,
    is_main_process: bool = True,
    weight_name: str | None = None,
    save_function: Callable[..., Any] | None = None,
    safe_serialization: bool = True,
) -> None:
    """Save NaRA adapters with all their components to one file, completely or not at all.

    Components that PEFT has wrapped (`pipe.unet = get_peft_model(pipe.unet, …)`) are included.

    Args:
        save_directory: the folder, created if it does not exist.
        adapter_name: the name of the adapter, or a list of names, e.g. of windows of λ, which
            loading makes active together. None means the only NaRA, or "default".
        is_main_process: if False, nothing is written. Pass False in all processes but one.
        weight_name: the file's name. None means "pytorch_nara_weights.safetensors".
        save_function: a function to call instead of safetensors' `save_file`, as
            save_function(tensors, path, metadata=…).
        safe_serialization: must be True; other formats are not written.

    Raises:
        ValueError: there is no such adapter; the adapter is also in a component that the file can't
            hold, such as a ControlNet; or `weight_name` does not end in .safetensors.
    """
    if not safe_serialization:
        raise ValueError("Adapters are saved as safetensors only. Leave safe_serialization out.")
    models = {component: unwrapped(model) for component, model in adaptable_models(self).items()}
    names = adapter_name if isinstance(adapter_name, list) else [adapter_name]
    weight_name = WEIGHTS_NAME if weight_name is None else weight_name
    if not weight_name.endswith(".safetensors") or Path(weight_name).name != weight_name:
        raise ValueError(
            f"weight_name is {weight_name!r}: pass the name of a .safetensors file without a folder."
        )
    with offloading_suspended(self):
        adapters = [_parts_to_save(self, models, _name_to_save(models, name)) for name in names]
        if is_main_process:
            file = AdapterFile.of_adapters(adapters)
            file.save(Path(save_directory, weight_name), save_function)


def unload_nara_weights(self: Pipeline) -> None:
    """Remove all NaRA adapters from the pipeline, leaving LoRAs unchanged.

    Fused weights stay fused, as with a LoRA. To avoid this, call `unfuse_lora` first.
    """
    models = adaptable_models(self)
    adapted = {name: model for name, model in models.items() if nara_adapters_of(model)}
    for component, model in adapted.items():
        check_not_wrapped(model, component, "unload_nara_weights")
    with offloading_suspended(self):
        for model in adapted.values():
            remove(model, list(nara_adapters_of(model)))


def _activate(models: Mapping[str, nn.Module], names: list[str]) -> None:
    """Make exactly these adapters active in the models that have one of them."""
    for model in models.values():
        present = [name for name in names if name in adapters_of(model)]
        for layer in tuner_layers(model) if present else ():
            layer.set_adapter(present)


def _check_parts(parts: Mapping[str, AdapterPart], models: Mapping[str, nn.Module]) -> None:
    """Raise ValueError if the pipeline has no model for a part, or the part can't be loaded."""
    for name, part in parts.items():
        if name not in models:
            raise ValueError(
                f"The adapter has a part for '{name}', but the components of this pipeline are {listed(models)}. "
                "Load it into the kind of pipeline that it was trained on."
            )
        check_not_wrapped(models[name], name, "load_nara_weights")
        check_storable(part.config, name)


def _swap(models: Mapping[str, nn.Module], parts: Mapping[str, AdapterPart], name: str) -> None:
    """Replace the adapter with that name in all components or, after an error, in none."""
    _check_parts(parts, models)
    for component, model in models.items():
        check_swappable(model, component, name, parts.get(component))
    swaps = [prepare_swap(models[component], name, part) for component, part in parts.items()]
    for write in swaps:
        write()


def _names_to_load(
    models: Mapping[str, nn.Module],
    name: str | None,
    hotswap: bool,
    count: int,
    is_list: bool = False,
) -> list[str]:
    """Return the names for adapters to load, which are `name`, name_0, …, or the first free default_N."""
    existing = {adapter for model in models.values() for adapter in adapters_of(model)}
    are_several = is_list or count > 1
    if hotswap:
        if are_several:
            raise ValueError(
                "hotswap=True replaces one adapter, but these are several. Load them without hotswap, or one by one."
            )
        if name is None or name not in existing:
            raise ValueError(
                f"hotswap=True replaces an existing adapter, but adapter_name is {name!r} and the pipeline has "
                f"{listed(sorted(existing)) or 'none'}. Pass the name of one of them, or leave hotswap out."
            )
        return [name]
    if name is None:
        first = len(adapters_of(next(iter(models.values()))))
        numbered = (f"default_{number}" for number in itertools.count(first))
        return list(itertools.islice((new for new in numbered if new not in existing), count))
    names = [f"{name}_{number}" for number in range(count)] if are_several else [name]
    if duplicates := existing.intersection(names):
        raise ValueError(
            f"adapter_name {listed(duplicates)} is a duplicate: the pipeline already has an adapter with that name. "
            "Choose another name, delete the old adapter with pipe.delete_adapters(…), or replace it with hotswap=True."
        )
    return names


def _name_to_save(models: Mapping[str, nn.Module], name: str | None) -> str:
    """Return the name of the adapter to save; if `name` is None, the only NaRA's or "default"."""
    naras = list({adapter for model in models.values() for adapter in nara_adapters_of(model)})
    name = name or (naras[0] if len(naras) == 1 else "default")
    if name not in naras:
        is_lora = any(name in adapters_of(model) for model in models.values())
        hint = f" '{name}' is a LoRA: save it with save_lora_weights." if is_lora else ""
        raise ValueError(
            f"There is no NaRA adapter '{name}' to save. The pipeline has {listed(sorted(naras)) or 'none'}.{hint}"
        )
    return name


def _parts_to_save(
    pipe: Pipeline, models: Mapping[str, nn.Module], name: str
) -> dict[str, AdapterPart]:
    """Return {component: the adapter's part} of all components that have the adapter.

    Raises:
        ValueError: the adapter is also in a component that a pipeline's file can't hold, or is a
            plain LoRA.
    """
    for component, model in pipe.components.items():
        is_left_out = component not in models and isinstance(model, nn.Module)
        if is_left_out and name in nara_adapters_of(unwrapped(model)):
            raise ValueError(
                f"Adapter '{name}' is also in '{component}', which a pipeline's file cannot contain. Save that part "
                f"with peft.PeftModel, or first remove it with pipe.{component}.delete_adapters('{name}')."
            )
    parts = {}
    for component, model in models.items():
        if name not in adapters_of(model):
            continue
        config = adapters_of(model)[name]
        if not isinstance(config, NaraConfig):
            raise ValueError(
                f"'{name}' of {component} is a plain LoRA, which a NaRA's file cannot contain. Add it as "
                'NaraConfig(core_type="identity", …), which computes the same.'
            )
        check_storable(config, component)
        config = copy(config)  # the model's own configuration stays unchanged
        base = getattr(pipe, "name_or_path", None) or config.base_model_name_or_path or None
        public_name = Path(base).name if base and Path(base).exists() else base
        config.base_model_name_or_path = public_name
        parts[component] = AdapterPart(config, part_of(model, name).tensors)
    return parts
