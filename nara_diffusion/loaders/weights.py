"""The three methods that every Diffusers pipeline gets: load, save and unload a NaRA adapter."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from nara_diffusion.config import NaraConfig
from nara_diffusion.tuner.injection import rollback_on_error
from nara_diffusion.tuner.strength.layers import live_strengths
from nara_diffusion.utils.atomic_write import atomic_write

from .format import WEIGHTS_NAME, AdapterPart, pack
from .guards import check_none_left_out, check_not_wrapped, offloading_suspended, unwrapped
from .hotswap import check_no_part_stays, check_swappable, prepare_for_hotswap, swap
from .hub import check_hub_options, push
from .insertion import adapters_of, insert, nara_adapters_of, part_of, remove
from .names import name_to_load, name_to_save
from .schedulers import DENOISERS, adopt_schedulers, check_schedulers, removing_adapters
from .source import naming, read_adapter
from .text_pipelines import COMPONENT, extend, text_pipeline
from .validation import TEXT_ENCODER, check_part, check_storable

logger = logging.getLogger(__name__)


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
    set_scheduler: bool = True,
) -> None:
    """Load a NaRA adapter into the denoiser, and its part for text encoders, if there is one, into those.

    Everything is checked before anything is changed. Afterwards `set_adapters`, `delete_adapters`, `disable_lora`,
    `unload_lora_weights`, … work as for a LoRA; λ is read from the timestep of each step. An adapter that changes what
    the model predicts (e.g. to the velocity of a rectified flow) brings its scheduler, which the pipeline uses while
    the adapter is active.

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
        set_scheduler: False leaves the scheduler to you; a warning says which one the adapter needs.

    Raises:
        ValueError: the pipeline has no denoiser; the file is missing, damaged or of another kind (a LoRA); the adapter
            is for another base model or another definition of λ; or the name is a duplicate. The pipeline is unchanged.
        OSError: the hub's error.
    """
    models = adaptable_models(self)
    parts = read_adapter(
        pretrained_model_name_or_path_or_dict,
        _denoiser_name(self),
        weight_name=weight_name,
        subfolder=subfolder,
        use_safetensors=use_safetensors,
        metadata=metadata,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        force_download=force_download,
        proxies=proxies,
        local_files_only=local_files_only,
    )
    for component in parts.keys() & models.keys():
        check_not_wrapped(models[component], component, "load_nara_weights")
    name = name_to_load(models, adapter_name, hotswap)
    carrying = parts if set_scheduler else {}
    with naming(pretrained_model_name_or_path_or_dict):
        fits = _fitting(self, models, parts, name, hotswap)
        check_schedulers(self, carrying)
    with naming(pretrained_model_name_or_path_or_dict), offloading_suspended(self):
        if hotswap:
            for model, _, part in fits:
                swap(model, name, part)
        else:
            _insert_all([(model, part) for model, _, part in fits], name, low_cpu_mem_usage)
    adopt_schedulers(self, carrying)
    kind = text_pipeline(self)
    if kind is not None:
        extend(kind)


def save_nara_weights(
    self: Any,
    save_directory: str | os.PathLike[str],
    adapter_name: str | None = None,
    *,
    is_main_process: bool = True,
    weight_name: str | None = None,
    save_function: Callable[..., Any] | None = None,
    safe_serialization: bool = True,
    push_to_hub: bool = False,
    **hub: Any,
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
        push_to_hub: upload the file afterwards, with a model card, which is written if the folder has none.
        hub: repo_id (by default the folder's name, in your namespace), token, private, commit_message, create_pr.

    Raises:
        ValueError: there is no such adapter; it is in a component that the file can't hold, such as a ControlNet;
            `save_directory` is a file; or `weight_name` does not end in .safetensors.
    """
    if not safe_serialization:
        raise ValueError("NaRA adapters are saved as safetensors only: leave safe_serialization out.")
    check_hub_options(push_to_hub, hub)
    models = {component: unwrapped(model) for component, model in adaptable_models(self).items()}
    name = name_to_save(models, adapter_name)
    check_none_left_out(self, models, name)
    weight_name = WEIGHTS_NAME if weight_name is None else weight_name
    _check_writable(save_directory, weight_name, save_function)
    with offloading_suspended(self):
        parts = {}
        for component, model in models.items():
            if name in adapters_of(model):
                _check_saved(model, component, name)
                parts[component] = part_of(model, name)
        if not is_main_process:
            return
        tensors, metadata = pack(parts)
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / weight_name) as partial:
            (save_function or save_file)(tensors, str(partial), metadata=metadata)
    if push_to_hub:
        push(self, folder, weight_name, parts, hub)


def unload_nara_weights(self: Any) -> None:
    """Remove all NaRA adapters of the pipeline, and restore its own scheduler. LoRAs stay as they are.

    Fused weights stay fused, as with a LoRA: call `unfuse_lora` first.
    """
    models = {name: model for name, model in adaptable_models(self).items() if nara_adapters_of(model)}
    for component, model in models.items():
        check_not_wrapped(model, component, "unload_nara_weights")
    with removing_adapters(self), offloading_suspended(self):
        for model in models.values():
            remove(model, list(nara_adapters_of(model)))


def adaptable_models(pipe: Any) -> dict[str, nn.Module]:
    """Component → model, the denoiser first, for all components that an adapter may have a part for.

    Raises:
        ValueError: the pipeline has no denoiser.
    """
    denoisers = (*DENOISERS, _denoiser_name(pipe))
    names = [name for name in pipe.components if name in denoisers or name.startswith(TEXT_ENCODER)]
    found = {name: getattr(pipe, name) for name in sorted(names, key=lambda name: name not in denoisers)}
    originals = {name: getattr(model, "_orig_mod", model) for name, model in found.items()}  # of torch.compile
    return {name: model for name, model in originals.items() if isinstance(model, nn.Module)}


def _denoiser_name(pipe: Any) -> str:
    for name in DENOISERS:
        if isinstance(getattr(pipe, name, None), nn.Module):
            return name
    if text_pipeline(pipe) is not None and isinstance(getattr(pipe, COMPONENT, None), nn.Module):
        return COMPONENT
    raise ValueError(
        f"{type(pipe).__name__} has none of {', '.join(DENOISERS)}, one of which a NaRA adapts: its components are "
        f"{', '.join(map(repr, pipe.components))}."
    )


def _fitting(
    pipe: Any, models: dict[str, nn.Module], parts: Mapping[str, AdapterPart], name: str, hotswap: bool
) -> list[tuple[nn.Module, str, AdapterPart]]:
    """(model, component, its part) of each part. Raises ValueError if one doesn't fit its model."""
    for component in parts:
        if component not in models:
            raise ValueError(
                f"It has a part for '{component}', but this {type(pipe).__name__} has "
                f"{', '.join(map(repr, models))}: load it into the pipeline that it was trained on."
            )
    if hotswap:
        held = [component for component, model in models.items() if name in adapters_of(model)]
        check_no_part_stays(held, parts, name)
    fits = [(model, component, parts[component]) for component, model in models.items() if component in parts]
    for model, component, part in fits:
        if hotswap:
            check_swappable(model, component, name, part)
        else:
            check_part(model, component, part, name)
    return fits


def _insert_all(fits: list[tuple[nn.Module, AdapterPart]], name: str, low_cpu_mem_usage: bool) -> None:
    """Insert the parts into all components, or, after an error, into none."""
    with ExitStack() as undo:
        for model, part in fits:
            undo.enter_context(rollback_on_error(model, name))
            insert(model, name, part, low_cpu_mem_usage)
            prepare_for_hotswap(model)


def _check_saved(model: nn.Module, component: str, name: str) -> None:
    config = adapters_of(model)[name]
    if not isinstance(config, NaraConfig):
        raise ValueError(
            f"'{name}' of {component} is a plain LoRA, which a NaRA's file cannot hold: add it by "
            'NaraConfig(core_type="identity", …), which is the same.'
        )
    check_storable(config, component)
    if config.strength is None and live_strengths(model, name):
        logger.warning(
            "'%s' of %s has strengths over λ by block, which no file can hold: it is saved without them.",
            name,
            component,
        )


def _check_writable(folder: Any, weight_name: str, save_function: Callable[..., Any] | None) -> None:
    if os.path.isfile(folder):
        raise ValueError(f"save_directory '{folder}' is a file: name a folder.")
    if not weight_name.endswith(".safetensors") or os.path.basename(weight_name) != weight_name:
        raise ValueError(f"weight_name is {weight_name!r}: pass the name of a .safetensors file, without a folder.")
    if save_function is None:
        return
    parameters = inspect.signature(save_function).parameters.values()
    if not any(p.name == "metadata" or p.kind is p.VAR_KEYWORD for p in parameters):
        raise ValueError(
            "save_function takes no metadata=, without which the file would lack its configuration: pass one like "
            "safetensors.torch.save_file."
        )
