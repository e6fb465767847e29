"""Read and write adapter files, which hold each component's configuration and tensors.

There are two formats. A pipeline's file is a safetensors file with configurations in its metadata:

    unet.down_blocks.1.….to_q.lora_A.weight   A, B and DoRA's magnitude of each adapted module
    unet.nara_core.shared.layers.0.weight     the core, once per component
    text_encoder.….q_proj.lora_A.weight       C = I, since text encoders run before there is a λ
    __metadata__["nara_adapter_metadata"]     {"format_version": 1, "components": {"unet": {…}}},
                                              with the fields of NaraConfig

A PEFT folder has one component, in adapter_config.json and adapter_model.safetensors. It is written
by `PeftModel.save_pretrained` and by `train_scripts/dllm.py`, also for checkpoints. Its keys begin
with "base_model.model.".

Each part is checked against its own configuration, without the base model. The sizes of the base's
layers are checked when the adapter is loaded. Both checks use `strict.check_tensors`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from torch import Tensor

from nara_diffusion.config import ABSENT, NaraConfig, NaraPeftType, is_idle
from nara_diffusion.cores.core import (
    BUILT_IN,
    NAME_IN_FILES,
    core_group,
    make_cores,
    with_current_names,
)
from nara_diffusion.strict import PEFT_PREFIX, check_tensors, is_core_key
from nara_diffusion.utils.files import atomic_write_files, listed

from .tensor_files import (
    METADATA_KEY,
    PEFT_CONFIG_NAME,
    PEFT_WEIGHTS_NAME,
    adapter_type,
    copied,
    locate,
    read_config_file,
    read_tensors,
    save_tensors,
)

FORMAT_VERSION = 1
BASE = "base_model_name_or_path"
"""The field with the base model's name: for a local directory, only its last part."""
MODEL = "model"
"""The name of a PEFT folder's component if no other is given."""

_ALWAYS_WRITTEN = (
    "r",
    "lora_alpha",
    "target_modules",
    "core_type",
    "core_scale",
    "use_rslora",
    "use_dora",
)
_OF_ONE_MACHINE = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "runtime_config",
)
"""Fields that say where a configuration was made or runs. The others describe the adapter."""

Source = str | os.PathLike[str] | Mapping[str, Tensor]
"""A file, a folder, a repository on the Hub, or a dict of tensors."""


@dataclass(frozen=True)
class AdapterFile:
    """An adapter outside any model.

    Attributes:
        parts: {component: its configuration and tensors}.
        path: the file with the tensors; None for a dict, or for an adapter that has not been
            written yet.
    """

    parts: dict[str, AdapterPart]
    path: Path | None = None

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
    ) -> AdapterFile:
        """Read a file, a folder, a repository on the Hub, or a dict of tensors with its `metadata`.

        Args:
            source: the file, folder, repository or dict to read.
            component: the component name to use for a PEFT folder.
            weight_name: the file's name in its folder or repository.
            subfolder: the subfolder of the folder or repository.
            metadata: the metadata for a dict of tensors.
            hub: options for downloads.

        Raises:
            ValueError: there is no file, or the file is damaged or of another kind.
            OSError: the download from the Hub failed.
        """
        if not isinstance(source, Mapping) and metadata is not None:
            raise ValueError("metadata is for a dict of tensors: a file has its own.")
        with naming(source):
            if isinstance(source, Mapping):
                given = {key: copied(tensor) for key, tensor in source.items()}
                return cls(_of_pipeline(given, metadata, "The dict"))
            path = locate(source, weight_name, subfolder, hub or {})
            tensors, metadata = read_tensors(path)
            if path.name == PEFT_WEIGHTS_NAME:
                return cls({component: _of_peft(path, tensors)}, path)
            return cls(_of_pipeline(tensors, metadata, f"'{path}'"), path)

    def save(self, path: Path, save_function: Callable[..., None] | None = None) -> None:
        """Write a pipeline's file completely or not at all, with safetensors' `save_file`.

        Args:
            path: the file to write.
            save_function: a function to call instead of `save_file`, with the same arguments.
        """
        tensors = {}
        components = {}
        for name, part in self.parts.items():
            components[name] = _fields(part.config)
            for key, tensor in part.tensors.items():
                tensors[f"{name}.{key}"] = tensor
        content = {"format_version": FORMAT_VERSION, "components": components}
        text = json.dumps(content, indent=2, sort_keys=True)
        save_tensors(tensors, path, {METADATA_KEY: text}, save_function)

    def save_peft(self, folder: Path) -> None:
        """Write a PEFT folder with the only part, both configuration and tensors, or nothing."""
        (part,) = self.parts.values()
        tensors = {f"{PEFT_PREFIX}{key}": tensor for key, tensor in part.tensors.items()}
        with atomic_write_files(folder) as partial:
            save_tensors(tensors, partial / PEFT_WEIGHTS_NAME)
            part.config.save_pretrained(str(partial))


@dataclass(frozen=True)
class AdapterPart:
    """The part of an adapter for one component.

    Attributes:
        config: the configuration of the part.
        tensors: the tensors of the part, by their names in the component.
    """

    config: NaraConfig
    tensors: dict[str, Tensor]

    @property
    def modules(self) -> dict[str, int]:
        """Return {adapted module: its rank}."""
        found = {}
        for key in self.tensors:
            name, is_factor, _ = key.partition(".lora_")
            if is_factor:
                found[name] = by_pattern(self.config.rank_pattern, name, self.config.r)
        return found

    @property
    def core(self) -> dict[str, Tensor]:
        """Return {name in the core: tensor} for the core's tensors."""
        found = {}
        for key, tensor in self.tensors.items():
            if is_core_key(key):
                found[key.removeprefix(f"{NAME_IN_FILES}.")] = tensor
        return found

    @property
    def core_ranks(self) -> dict[str, int]:
        """Return {group of layers that share a core: the largest of their ranks}."""
        found: dict[str, int] = {}
        for name, rank in self.modules.items():
            group = core_group(self.config, name, rank)
            found[group] = max(rank, found.get(group, 0))
        return found


@contextmanager
def naming(source: Source, subfolder: str | None = None) -> Iterator[None]:
    """Add the adapter's `source` to errors raised inside the context, unless they name it."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        # PEFT raises TypeError, KeyError and AttributeError for malformed configurations
        is_clear = isinstance(error, ValueError)
        if is_clear and not isinstance(source, Mapping) and str(source) in str(error):
            raise
        path = f"{source}/{subfolder}" if subfolder else source
        where = "the dict" if isinstance(source, Mapping) else f"'{path}'"
        reason = error if is_clear else f"{type(error).__name__}: {error}"
        raise ValueError(f"The adapter in {where} is refused: {reason}") from error


# ---------------------------------------------------------------------- PEFT's format


def _of_peft(path: Path, tensors: dict[str, Tensor]) -> AdapterPart:
    """Return the adapter part from the PEFT folder that contains the weights file `path`."""
    config = path.with_name(PEFT_CONFIG_NAME)
    if not config.is_file():
        raise ValueError(
            f"There is no '{config.name}' beside '{path.name}' in '{path.parent}': PEFT writes both."
        )
    kind = adapter_type(config)
    if kind != NaraPeftType.NARA.value:
        raise ValueError(
            f"'{config}' describes an adapter of type {kind}, not NARA: load it with "
            "peft.PeftModel.from_pretrained(…)."
        )
    given = read_config_file(config)
    own = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in tensors.items()}
    part = AdapterPart(config_from_fields(given, f"'{config}'"), with_current_names(own))
    part.config.base_model_name_or_path = given.get(BASE)
    part.config.auto_mapping = given.get("auto_mapping")
    _check_part(part, beside=True)
    return part


# ---------------------------------------------------------------------- a pipeline's format


def _of_pipeline(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None, origin: str
) -> dict[str, AdapterPart]:
    """Return the parts in a pipeline's file, which error messages call `origin`."""
    if not metadata or METADATA_KEY not in metadata:
        raise ValueError(f"{origin} is {_kind_without_configuration(tensors)}.")
    configs = _configs(metadata[METADATA_KEY], origin)
    split: dict[str, dict[str, Tensor]] = {name: {} for name in configs}
    for key, tensor in with_current_names(tensors).items():
        component, _, rest = key.partition(".")
        if component not in split:
            raise ValueError(
                f"{origin} has '{key}', but its configuration is only for {listed(configs)}: it is damaged."
            )
        split[component][rest] = tensor
    parts = {}
    for name, own in split.items():
        parts[name] = AdapterPart(configs[name], own)
        try:
            _check_part(parts[name], beside=False)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return parts


def _kind_without_configuration(tensors: Mapping[str, Tensor]) -> str:
    """Describe a file without a NaRA configuration, for an error message."""
    if any(map(is_core_key, tensors)):
        return (
            "a NaRA's, but its configuration is missing: pass safe_open(file, 'pt').metadata() as "
            "metadata="
        )
    if any(".lora" in key for key in tensors):
        if all(key.startswith(PEFT_PREFIX) for key in tensors):
            return "a LoRA, without core: load it with peft.PeftModel.from_pretrained(…)"
        return "a LoRA, without core: load it with pipe.load_lora_weights(…)"
    found = listed(tensors) or "no tensor"
    return f"no NaRA adapter: it has {found}. Pass what save_nara_weights wrote"


def _configs(text: str, origin: str) -> dict[str, NaraConfig]:
    """Return {component: configuration} from a file's metadata."""
    try:
        content = dict(json.loads(text))
        version = content["format_version"]
        given = content["components"] if version == FORMAT_VERSION else {}
        components = {name: dict(own) for name, own in given.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"The configuration in the metadata of {origin} can't be read ({error!r}): it is damaged."
        ) from None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{origin} has format_version {version!r}, this nara-diffusion reads {FORMAT_VERSION}: "
            "update the package, or save the adapter again with this one."
        )
    if not components:
        raise ValueError(
            f"{origin} names no component that it adapts: it is damaged, download or save it again."
        )
    configs = {}
    for name, own in components.items():
        configs[name] = config_from_fields(own, f"{origin}, '{name}'")
        configs[name].base_model_name_or_path = own.get(BASE)
    return configs


def _fields(config: NaraConfig) -> dict[str, Any]:
    """Return a configuration's fields for a pipeline's file, with the base model if known."""
    found = config_to_fields(config)
    if config.base_model_name_or_path:
        found[BASE] = config.base_model_name_or_path
    return found


# ---------------------------------------------------------------------- fields of a configuration


def config_to_fields(config: NaraConfig) -> dict[str, Any]:
    """Return a configuration's fields as JSON values.

    Fields that depend on the machine are left out, and so are fields that are None, unless files
    without them have another value.
    """
    found = {}
    for name, value in config.to_dict().items():
        if name in _OF_ONE_MACHINE or (value is None and name not in ABSENT):
            continue
        if isinstance(value, Enum):
            value = value.value
        found[name] = sorted(value) if isinstance(value, set) else value
    return found


def config_from_fields(given: Mapping[str, Any], origin: str) -> NaraConfig:
    """Return the configuration from `config_to_fields`, or from PEFT's adapter_config.json.

    Raises:
        ValueError: a field is missing, unknown or invalid. The message names the `origin`.
    """
    known = {field.name for field in fields(NaraConfig)}
    own: dict[str, Any] = {**ABSENT}
    for name, value in given.items():
        if name in _OF_ONE_MACHINE or (name not in known and is_idle(name, value)):
            continue
        own[name] = value
    for name in _ALWAYS_WRITTEN:
        if name not in own:
            raise ValueError(
                f"The configuration of {origin} lacks {name}, which every NaRA's file has: damaged."
            )
    try:
        return NaraConfig(**own)
    except (TypeError, ValueError, AttributeError, ImportError) as error:
        # PEFT's checks raise the last two errors
        raise ValueError(f"The configuration of {origin} is refused: {error}") from error


# ---------------------------------------------------------------------- the check, without a base


def _check_part(part: AdapterPart, *, beside: bool) -> None:
    """Compare the tensors of a file with those that its configuration describes.

    Args:
        part: the part of the file to check.
        beside: True if a file of this form may also contain biases, tokens, embeddings and
            `modules_to_save`.

    Raises:
        ValueError: no module has factors, a module with factors is not in `target_modules`, or
            `check_tensors` raises an error.
    """
    config = part.config
    if not part.modules:
        raise ValueError("it has no A and B of any module: download or save it again.")
    expected = _core_tensors(part)
    for name, rank in part.modules.items():
        if not _is_target(config, name):
            raise ValueError(
                f"it has factors of '{name}', a module that its target_modules "
                f"{config.target_modules} don't name: it is damaged, download or save it again."
            )
        expected |= _factors(part, name, rank)
    known = dict(expected)
    for key, tensor in part.tensors.items():
        if beside and key not in known and _may_stand_beside(config, key, tensor):
            known[key] = tensor
    check_tensors(part.tensors, expected, known)


def _is_target(config: NaraConfig, name: str) -> bool:
    if config.target_modules in (None, "all-linear"):  # PEFT writes names instead
        return True
    return bool(check_target_module_exists(config, name.partition(".base_layer")[0]))


def _core_tensors(part: AdapterPart) -> dict[str, Tensor]:
    with torch.device("meta" if part.config.core_type in BUILT_IN else "cpu"):
        cores = make_cores(part.config, part.core_ranks)
    return {f"{NAME_IN_FILES}.{key}": tensor for key, tensor in cores.state_dict().items()}


def _factors(part: AdapterPart, name: str, rank: int) -> dict[str, Tensor]:
    """Return {key: an empty tensor of the expected shape and dtype} for a module's factors.

    The sizes of the base's layer are taken from the file.
    """
    tensors = part.tensors
    A, B = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
    if any(key.startswith(f"{name}.lora_embedding_") for key in tensors):
        A, B = f"{name}.lora_embedding_A", f"{name}.lora_embedding_B"
    shape_A, shape_B = _shape(tensors.get(A)), _shape(tensors.get(B))
    d_out, width = shape_B[:2]
    kernel = (1,) * len(shape_A[2:])
    is_grouped = kernel and width and rank % width == 0  # then B is (d_out, rank / groups, 1, …)
    shapes: dict[str, tuple[int, ...]] = {
        A: (rank, *shape_A[1:]),
        B: (d_out, width if is_grouped else rank, *kernel),
    }
    if part.config.use_dora:
        key = f"{name}.lora_magnitude_vector"
        key = f"{key}.weight" if f"{key}.weight" in tensors else key
        shapes[key] = (1, d_out, *kernel) if kernel else (d_out,)
    if part.config.lora_bias:
        shapes[f"{name}.lora_B.bias"] = (d_out,)
    return {key: _like(tensors.get(key), shape) for key, shape in shapes.items()}


def _shape(tensor: object) -> tuple[int, ...]:
    """Return a tensor's shape, extended to at least two axes."""
    shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else ()
    return shape if len(shape) > 1 else (*shape, 1, 1)[:2]


def _like(tensor: object, shape: tuple[int, ...]) -> Tensor:
    """Return a "meta" tensor of that shape, in the dtype of `tensor` if layers can compute in it."""
    dtype = torch.float32
    if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype.itemsize > 1:
        dtype = tensor.dtype
    return torch.empty(shape, dtype=dtype, device="meta")


def _may_stand_beside(config: NaraConfig, key: str, tensor: object) -> bool:
    """Return whether a tensor other than a factor, such as a bias, may be in the file."""
    if not isinstance(tensor, Tensor) or ".lora_" in key or is_core_key(key):
        return False
    module, _, kind = key.rpartition(".")
    for name in config.modules_to_save or ():
        if re.match(rf"(^|.*\.){name}($|\..*)", module):
            return True
    if kind == "weight" and tensor.dim() == 2:  # PEFT saves embeddings of a resized vocabulary
        return True
    if kind == "bias" and config.bias != "none":
        return True
    return "trainable_tokens" in kind


# ---------------------------------------------------------------------- one module's values

Value = TypeVar("Value")


def by_pattern(pattern: Mapping[str, Value] | None, name: str, default: Value) -> Value:
    """Return a module's value from PEFT's rank_pattern or alpha_pattern."""
    pattern = pattern or {}
    return pattern.get(str(get_pattern_key(list(pattern), name)), default)


def configured_scaling(config: LoraConfig, name: str, rank: int) -> float:
    """Return a module's α / r, or α / √r for rsLoRA."""
    alpha = by_pattern(config.alpha_pattern, name, config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)
