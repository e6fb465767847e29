"""An adapter's file: the configuration and tensors of each component, in one of two formats.

A pipeline's file is one safetensors file, with the configurations in its metadata:

    unet.down_blocks.1.….to_q.lora_A.weight      A, B and, for DoRA, the magnitude, of each adapted module
    unet.nara_core.shared.layers.0.weight        the core, once a component
    text_encoder.….q_proj.lora_A.weight          text encoders run before there is a λ: C = I
    __metadata__["nara_adapter_metadata"]        {"format_version": 1, "components": {"unet": NaraConfig's fields, …}}

PEFT's folder holds one component: adapter_config.json and adapter_model.safetensors, of `PeftModel.save_pretrained`,
`train_scripts/dllm.py` and its checkpoints. Its keys begin with "base_model.model.".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.utils.hub_utils import _get_model_file
from peft import PeftModel
from peft.utils import CONFIG_NAME as PEFT_CONFIG_NAME
from peft.utils import SAFETENSORS_WEIGHTS_NAME as PEFT_WEIGHTS_NAME
from torch import Tensor

from nara_diffusion.config import NaraConfig, config_from_fields, config_to_fields
from nara_diffusion.cores.registry import with_current_names
from nara_diffusion.utils.atomic_write import atomic_write_files
from nara_diffusion.utils.naming import is_out_of_reach, listed

from .adapter_part import AdapterPart, check_part, is_naras, read_config_file
from .strict import (
    PEFT_PREFIX,
    PICKLE,
    check_loaded,
    check_regular,
    copied,
    is_core_key,
    read_tensors,
    save_tensors,
)

WEIGHTS_NAME = "pytorch_nara_weights.safetensors"
METADATA_KEY = "nara_adapter_metadata"
FORMAT_VERSION = 1
BASE = "base_model_name_or_path"
"""The field that names the base model; a directory of this machine by its last part."""
MODEL = "model"
"""The name of the component of a PEFT folder, where no other is given."""


@dataclass(frozen=True)
class AdapterFile:
    """An adapter outside of any model.

    Attributes:
        parts: {component: its configuration and tensors}.
        path: the file with the tensors; None of a dict, and of an adapter that is not written yet.
    """

    parts: dict[str, AdapterPart]
    path: Path | None = None

    @classmethod
    def read(
        cls,
        source: Any,
        component: str = MODEL,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        metadata: Mapping[str, str] | None = None,
        **hub: Any,
    ) -> AdapterFile:
        """Read a file, a folder, a repository on the Hub, or a dict of tensors with its `metadata`.

        Args:
            component: what a PEFT folder's adapter is for.
            hub: revision, token, cache_dir, force_download, proxies, local_files_only.

        Raises:
            ValueError: there is no file, or it is damaged or of another kind. OSError: the Hub's error.
        """
        if not isinstance(source, Mapping) and metadata is not None:
            raise ValueError("metadata is for a dict of tensors: a file has its own.")
        with naming(source):
            if isinstance(source, Mapping):
                given = {key: copied(tensor) for key, tensor in source.items()}
                return cls(_of_pipeline(given, metadata, "The dict"))
            path = _locate(source, weight_name, subfolder, hub)
            tensors, metadata = read_tensors(path)
            if path.name == PEFT_WEIGHTS_NAME:
                return cls({component: _of_peft(path, tensors)}, path)
            return cls(_of_pipeline(tensors, metadata, f"'{path}'"), path)

    def save(self, path: Path, save_function: Callable[..., Any] | None = None) -> None:
        """Write a pipeline's file, whole or not at all, as `save_file` of safetensors does.

        Args:
            save_function: called as safetensors' `save_file`, in its place.
        """
        tensors = {
            f"{name}.{key}": t
            for name, part in self.parts.items()
            for key, t in part.tensors.items()
        }
        components = {name: _fields(part.config) for name, part in self.parts.items()}
        content = json.dumps(
            {"format_version": FORMAT_VERSION, "components": components}, indent=2, sort_keys=True
        )
        save_tensors(tensors, path, {METADATA_KEY: content}, save_function)

    def save_peft(self, folder: Path) -> None:
        """Write a PEFT folder of the only part: adapter_config.json and adapter_model.safetensors, both or none."""
        (part,) = self.parts.values()
        tensors = {f"{PEFT_PREFIX}{key}": tensor for key, tensor in part.tensors.items()}
        with atomic_write_files(folder) as partial:
            save_tensors(tensors, partial / PEFT_WEIGHTS_NAME)
            part.config.save_pretrained(str(partial))


@contextmanager
def naming(source: Any) -> Iterator[None]:
    """Inside, errors get the name of the adapter's `source` (see `AdapterFile.read`), unless they have it."""
    try:
        yield
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
    ) as error:  # PEFT's of odd configurations
        is_clear = isinstance(error, ValueError)
        if is_clear and not isinstance(source, Mapping) and str(source) in str(error):
            raise
        where = "the dict" if isinstance(source, Mapping) else f"'{source}'"
        reason = error if is_clear else f"{type(error).__name__}: {error}"
        raise ValueError(f"The adapter in {where} is refused: {reason}") from error


# ---------------------------------------------------------------------- where the tensors are


def _locate(
    source: Any, weight_name: str | None, subfolder: str | None, hub: Mapping[str, Any]
) -> Path:
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        return _in_folder(path / subfolder if subfolder else path, weight_name)
    check_regular(path)
    if (
        isinstance(source, Path)
        or str(source).startswith((".", "/", "~"))
        or path.suffix == ".safetensors"
    ):
        raise ValueError(
            f"There is no file or folder '{source}': pass what save_nara_weights or PEFT wrote."
        )
    try:
        return _download(source, weight_name or WEIGHTS_NAME, subfolder, hub)
    except OSError as error:
        if weight_name is not None:
            raise
        try:
            _download(source, PEFT_CONFIG_NAME, subfolder, hub)
            return _download(source, PEFT_WEIGHTS_NAME, subfolder, hub)
        except OSError:
            raise error from None  # that of the name which was meant


def _download(repository: Any, name: str, subfolder: str | None, hub: Mapping[str, Any]) -> Path:
    agent = {"file_type": "nara_weights", "framework": "pytorch"}
    try:
        return Path(
            _get_model_file(
                str(repository), weights_name=name, subfolder=subfolder, user_agent=agent, **hub
            )
        )
    except OSError as error:
        if not is_out_of_reach(error):
            raise
        raise OSError(
            f"There is no folder '{repository}', and the Hub, for a repository of that name, can't be reached: look at "
            "the connection, or name a file or folder."
        ) from error


def _in_folder(folder: Path, weight_name: str | None) -> Path:
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    others = [path.name for path in files if path.suffix == ".safetensors" and path.is_file()]
    names = [WEIGHTS_NAME, PEFT_WEIGHTS_NAME, *(others if len(others) == 1 else [])]
    for name in names if weight_name is None else [weight_name]:
        if (folder / name).is_file():
            return folder / name
        check_regular(folder / name)
    pickles = [path.name for path in files if path.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    found = "it has no safetensors file" + (f", but {listed(pickles)}, {PICKLE}" if pickles else "")
    if others:
        is_pefts = (
            weight_name == PEFT_WEIGHTS_NAME
        )  # of any method, for which there are no other names
        found = f"{'name a folder of PEFT, not of' if is_pefts else 'pass weight_name, one of'} {listed(others)}"
    raise ValueError(f"There is no '{weight_name or WEIGHTS_NAME}' in '{folder}': {found}.")


# ---------------------------------------------------------------------- the two formats


def _of_peft(path: Path, tensors: dict[str, Tensor]) -> AdapterPart:
    config = path.with_name(PEFT_CONFIG_NAME)
    if not config.is_file():
        raise ValueError(
            f"There is no '{config.name}' beside '{path.name}' in '{path.parent}': PEFT writes both."
        )
    origin, given = f"'{config}'", read_config_file(config)
    if not is_naras(config):
        raise ValueError(
            f"{origin} describes an adapter of type {given.get('peft_type')}, not NARA: load it by "
            "pipe.load_lora_weights(…) or peft.PeftModel.from_pretrained(…)."
        )
    own = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in tensors.items()}
    part = AdapterPart(config_from_fields(given, origin), with_current_names(own))
    part.config.base_model_name_or_path = given.get(BASE)
    part.config.auto_mapping = given.get("auto_mapping")
    check_part(part, beside=True)
    return part


def _of_pipeline(
    tensors: Mapping[str, Any], metadata: Mapping[str, str] | None, origin: str
) -> dict[str, AdapterPart]:
    """The parts of a pipeline's file. `origin` names it in messages."""
    if not metadata or METADATA_KEY not in metadata:
        kind = f"no NaRA adapter: it holds {listed(tensors) or 'no tensor'}. Pass what save_nara_weights wrote"
        if any(map(is_core_key, tensors)):
            kind = "a NaRA's, but its configuration is missing: pass safe_open(file, 'pt').metadata() as metadata="
        elif any(".lora" in key for key in tensors):
            kind = "a LoRA, without core: load it by pipe.load_lora_weights(…)"
        raise ValueError(f"{origin} is {kind}.")
    configs = _configs(metadata[METADATA_KEY], origin)
    split: dict[str, dict[str, Tensor]] = {name: {} for name in configs}
    for key, tensor in with_current_names(tensors).items():
        component, _, rest = key.partition(".")
        if component not in split:
            raise ValueError(
                f"{origin} holds '{key}', but its configuration knows {listed(configs)} only: damaged."
            )
        split[component][rest] = tensor
    parts = {name: AdapterPart(configs[name], own) for name, own in split.items()}
    for name, part in parts.items():
        try:
            check_part(part, beside=False)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return parts


def _configs(text: str, origin: str) -> dict[str, NaraConfig]:
    try:
        content = dict(json.loads(text))
        version = content["format_version"]
        given = content["components"] if version == FORMAT_VERSION else {}
        components = {name: dict(own) for name, own in given.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"The configuration in the metadata of {origin} can't be read ({error!r}): damaged."
        ) from None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{origin} has format_version {version!r}, this nara-diffusion reads {FORMAT_VERSION}: update the package, "
            "or save the adapter again with this one."
        )
    if not components:
        raise ValueError(
            f"{origin} names no component that it adapts: it is damaged, download or save it again."
        )
    configs = {
        name: config_from_fields(own, f"{origin}, '{name}'") for name, own in components.items()
    }
    for name, config in configs.items():
        config.base_model_name_or_path = components[name].get(BASE)
    return configs


def _fields(config: NaraConfig) -> dict[str, Any]:
    """The fields of a configuration in a pipeline's file, with the base model if it is known."""
    base = config.base_model_name_or_path
    return config_to_fields(config) | ({BASE: base} if base else {})


# ---------------------------------------------------------------------- adapters of other methods


def read_peft_tensors(
    source: str | Path, subfolder: str | None = None, **hub: Any
) -> dict[str, Tensor]:
    """The tensors of an adapter of any method in PEFT's format, by PEFT's keys; see `AdapterFile.read`."""
    return read_tensors(_locate(source, PEFT_WEIGHTS_NAME, subfolder, hub))[0]


def load_peft_adapter(model: Any, source: str | Path, **options: Any) -> PeftModel:
    """`PeftModel.from_pretrained`, with a check that all tensors of the file were loaded.

    Args:
        source: folder or repository. options: `revision`, `subfolder`, ….

    Raises:
        ValueError: nothing is there; the folder's weights are missing or damaged; or as `check_loaded`.
    """
    tensors = read_peft_tensors(source, **options)
    adapted: Any = PeftModel.from_pretrained(model, str(source), **options)
    check_loaded(adapted, "default", tensors, str(source))
    return adapted
