"""Read and write adapter files, which hold each component's configuration and tensors.

There are two formats. A pipeline's file is a safetensors file with configurations in its metadata:

    unet.down_blocks.1.….to_q.lora_A.weight   A, B and DoRA's magnitude of each adapted module
    unet.nara_core.shared.layers.0.weight     the core, once per component
    text_encoder.….q_proj.lora_A.weight       C = I, since text encoders run before there is a λ
    __metadata__["nara_adapter_metadata"]     {"format_version": 1, "components": {"unet": {…}}},
                                              with the fields of NaraConfig

A file of another project (time_aware.py) has one component too, and its format is recognised by its
keys. A file of several adapters, e.g. for windows of λ, has their numbers: "unet#0.…", "unet#1.…".

A PEFT folder has one component, in adapter_config.json and adapter_model.safetensors. It is written
by `PeftModel.save_pretrained` and by `train_scripts/dllm.py`, also for checkpoints. Its keys begin
with "base_model.model.".

Each part is checked against its own configuration, without the base model, or against a model that
it is loaded into, sizes of the base's layers included. Both use `strict.check_tensors`, once a load.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from nara_diffusion.config import NaraConfig, NaraPeftType
from nara_diffusion.cores.core_set import is_core_key, with_current_names
from nara_diffusion.strict import PEFT_PREFIX
from nara_diffusion.utils.files import atomic_write_files
from nara_diffusion.utils.wording import listed

from .adapter_part import AdapterPart, check_part, config_from_fields, config_to_fields
from .lycoris import convert_lycoris
from .tc_lora import convert_tc_lora
from .tensor_files import (
    METADATA_KEY,
    PEFT_CONFIG_NAME,
    PEFT_WEIGHTS_NAME,
    copied,
    locate,
    read_config_file,
    read_tensors,
    save_tensors,
)
from .time_aware import LYCORIS, REPOSITORY, TC_LORA, format_of
from .tlora import OtherFile, convert_repository

FORMAT_VERSION = 1
MODEL = "model"
"""The name of a PEFT folder's component if no other is given."""

Source = str | os.PathLike[str] | Mapping[str, Tensor]
"""A file, a folder, a repository on the Hub, or a dict of tensors."""

_CONVERTERS = {
    LYCORIS: convert_lycoris,
    REPOSITORY: convert_repository,
    TC_LORA: convert_tc_lora,
}
"""{name of another project's format: the function that makes an adapter's part of it}."""


@dataclass(frozen=True)
class AdapterFile:
    """An adapter outside any model.

    Attributes:
        parts: {component: its configuration and tensors}.
        path: the file with the tensors; None for a dict, or for an adapter that has not been
            written yet.
        other: the name of the format, for a file of another project.
    """

    parts: dict[str, AdapterPart]
    path: Path | None = None
    other: str | None = None

    @classmethod
    def read(
        cls,
        source: Source,
        component: str = MODEL,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        metadata: Mapping[str, str] | None = None,
        hub: Mapping[str, Any] | None = None,
        for_model: bool = False,
        base: Callable[[], nn.Module] | None = None,
        without_base: bool = False,
        rank_mask: Mapping[str, float] | None = None,
    ) -> AdapterFile:
        """Read a file, a folder, a repository on the Hub, or a dict of tensors with its `metadata`.

        Args:
            source: the file, folder, repository or dict to read.
            component: the component name to use for a PEFT folder or another project's file.
            weight_name: the file's name in its folder or repository.
            subfolder: the subfolder of the folder or repository.
            metadata: the metadata for a dict of tensors.
            hub: options for downloads.
            for_model: True if the caller will compare the tensors with those of a model, so that
                they are not compared with the configuration here.
            base: a function that returns the base model. A file of LyCORIS needs its weights.
            without_base: True if shapes are enough for such a file: its tensors are on "meta".
            rank_mask: "min" and "exponent" of T-LoRA's mask, for files of other projects.

        Raises:
            ValueError: there is no file, or the file is damaged or of another kind.
            OSError: the download from the Hub failed.
        """
        with naming(source):
            path = None
            if isinstance(source, Mapping):
                tensors = {key: copied(tensor) for key, tensor in source.items()}
            else:
                path = locate(source, weight_name, subfolder, hub or {})
                tensors, metadata = read_tensors(path)
            other = None if METADATA_KEY in (metadata or {}) else format_of(tensors)
            if rank_mask is not None and other not in (LYCORIS, REPOSITORY):
                raise ValueError("rank_mask is for a T-LoRA of another project: leave it out.")
            if other is not None:
                part = _CONVERTERS[other](OtherFile(tensors, path, base, without_base, rank_mask))
                check_part(part, beside=False, for_model=for_model or without_base)
                return cls({component: part}, path, other)
            if path is not None and path.name == PEFT_WEIGHTS_NAME:
                return cls({component: _of_peft(path, tensors, for_model)}, path)
            origin = "The dict" if path is None else f"'{path}'"
            return cls(parts_of_pipeline(tensors, metadata, origin, for_model), path)

    @classmethod
    def of_adapters(cls, adapters: list[dict[str, AdapterPart]]) -> AdapterFile:
        """Return a file of one or more adapters, each given as {component: its part}."""
        if len(adapters) == 1:
            return cls(adapters[0])
        return cls(
            {
                f"{component}#{number}": part
                for number, adapter in enumerate(adapters)
                for component, part in adapter.items()
            }
        )

    @property
    def adapters(self) -> list[dict[str, AdapterPart]]:
        """Return {component: its part} of each adapter in the file."""
        adapters: dict[str, dict[str, AdapterPart]] = {}
        for name, part in self.parts.items():
            component, _, number = name.partition("#")
            adapters.setdefault(number, {})[component] = part
        return [adapters[number] for number in sorted(adapters, key=lambda n: (len(n), n))]

    def save(self, path: Path, save_function: Callable[..., None] | None = None) -> None:
        """Write a pipeline's file completely or not at all, with safetensors' `save_file`.

        Args:
            path: the file to write, in a folder that is created if it does not exist.
            save_function: a function to call instead of `save_file`, with the same arguments.
        """
        tensors = {
            f"{name}.{key}": tensor
            for name, part in self.parts.items()
            for key, tensor in part.tensors.items()
        }
        components = {name: config_to_fields(part.config) for name, part in self.parts.items()}
        content = {"format_version": FORMAT_VERSION, "components": components}
        metadata = {METADATA_KEY: json.dumps(content, indent=2, sort_keys=True)}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(tensors, path, metadata, save_function)

    def save_peft(self, folder: Path) -> None:
        """Write a PEFT folder with the only part, both configuration and tensors, or nothing."""
        (part,) = self.parts.values()
        tensors = {f"{PEFT_PREFIX}{key}": tensor for key, tensor in part.tensors.items()}
        with atomic_write_files(folder) as partial:
            save_tensors(tensors, partial / PEFT_WEIGHTS_NAME)
            part.config.save_pretrained(str(partial))


@contextmanager
def naming(source: Source, subfolder: str | None = None) -> Iterator[None]:
    """Add the adapter's `source` to errors raised inside the context, unless they name it."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, re.error, SafetensorError) as error:
        # PEFT raises TypeError, KeyError, … and re.error for malformed configurations
        is_clear = isinstance(error, ValueError)
        if is_clear and not isinstance(source, Mapping) and str(source) in str(error):
            raise
        path = f"{source}/{subfolder}" if subfolder else source
        where = "the dict" if isinstance(source, Mapping) else f"'{path}'"
        reason = error if is_clear else f"{type(error).__name__}: {error}"
        raise ValueError(f"The adapter in {where} can't be loaded: {reason}") from error


def _of_peft(path: Path, tensors: dict[str, Tensor], for_model: bool) -> AdapterPart:
    """Return the adapter part from the PEFT folder that contains the weights file `path`."""
    config = path.with_name(PEFT_CONFIG_NAME)
    if not config.is_file():
        raise ValueError(
            f"'{path.parent}' contains '{path.name}' but no '{config.name}', and PEFT writes both. Copy or download "
            "the whole folder."
        )
    json_values = read_config_file(config)
    kind = json_values["peft_type"]
    if kind != NaraPeftType.NARA.value:
        raise ValueError(
            f"'{config}' describes an adapter of type {kind}, not NARA: load it with "
            "peft.PeftModel.from_pretrained(…)."
        )
    tensors = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in tensors.items()}
    part = AdapterPart(config_from_fields(json_values, f"'{config}'"), with_current_names(tensors))
    part.config.auto_mapping = json_values.get("auto_mapping")
    check_part(part, beside=True, for_model=for_model)
    return part


def parts_of_pipeline(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None,
    origin: str,
    for_model: bool,
) -> dict[str, AdapterPart]:
    """Return the parts in a pipeline's file, which error messages call `origin`."""
    if not metadata or METADATA_KEY not in metadata:
        raise ValueError(f"{origin} is {_kind_without_configuration(tensors)}.")
    configs = _configs(metadata[METADATA_KEY], origin)
    split: dict[str, dict[str, Tensor]] = {name: {} for name in configs}
    for key, tensor in with_current_names(tensors).items():
        component, _, name_in_component = key.partition(".")
        if component not in split:
            raise ValueError(
                f"{origin} has '{key}', but its configuration is only for {listed(configs)}. The file is damaged: "
                "download or save it again."
            )
        split[component][name_in_component] = tensor
    parts = {}
    for name, config in configs.items():
        parts[name] = AdapterPart(config, split[name])
        try:
            check_part(parts[name], beside=False, for_model=for_model)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return parts


def _kind_without_configuration(tensors: Mapping[str, Tensor]) -> str:
    """Describe a file without a NaRA configuration, for an error message."""
    if any(map(is_core_key, tensors)):
        return (
            "a NaRA without its configuration: pass safe_open(file, 'pt').metadata() as metadata="
        )
    if any(".lora" in key for key in tensors):
        is_of_peft = all(key.startswith(PEFT_PREFIX) for key in tensors)
        call = "peft.PeftModel.from_pretrained(…)" if is_of_peft else "pipe.load_lora_weights(…)"
        return f"a LoRA, without core: load it with {call}"
    return f"no NaRA adapter: it has {listed(tensors) or 'no tensor'}. Pass a file that save_nara_weights wrote"


def _configs(text: str, origin: str) -> dict[str, NaraConfig]:
    """Return {component: configuration} from a file's metadata."""
    try:
        content = dict(json.loads(text))
        version = content["format_version"]
        components = content["components"] if version == FORMAT_VERSION else {}
        components = {name: dict(json_values) for name, json_values in components.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"The configuration in the metadata of {origin} can't be read ({error!r}). The file is damaged: download "
            "or save it again."
        ) from None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{origin} has format_version {version!r}, but this version of nara-diffusion reads {FORMAT_VERSION}: "
            "update the package, or save the adapter again with the installed version."
        )
    if not components:
        raise ValueError(
            f"The configuration of {origin} has no components. The file is damaged: download or save it again."
        )
    return {
        name: config_from_fields(json_values, f"{origin}, '{name}'")
        for name, json_values in components.items()
    }
