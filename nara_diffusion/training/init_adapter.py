"""`--init_adapter`: training starts from a saved LoRA or NaRA, which has to agree with the other arguments."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.utils import CONFIG_NAME
from safetensors import SafetensorError, safe_open
from torch import nn

from nara_diffusion import NaraConfig
from nara_diffusion.config import changes_base, is_naras, read_config_file
from nara_diffusion.export.from_lora import check_identity, copy_tensors
from nara_diffusion.export.plain_lora import PlainLora
from nara_diffusion.export.read_lora import lora_of_tensors, read_lora
from nara_diffusion.loaders.file import METADATA_KEY, WEIGHTS_NAME, AdapterFile, AdapterPart, naming
from nara_diffusion.loaders.strict import is_core_key
from nara_diffusion.noise.prediction import Prediction, prediction_in
from nara_diffusion.tuner.holder import HOLDER_NAME, holder_of

from .adapters import CORE_FIELDS

_AS_BASE = "what the base predicts"
_FREE = {"core_init", "lora_a_init", "noise_convention", "scheduler", "strength"}
"""Fields of a core that say how it starts, or what it was trained for, and not what its tensors mean."""


def start_from(
    components: Mapping[str, Any],
    path: str,
    source_model: Any,
    adapter_name: str = "default",
    *,
    prediction: Prediction | None = None,
) -> None:
    """Copy the tensors of the adapter in `path` into `components`. Both have to adapt the same layers.

    A LoRA gives A, B and magnitudes, and the core stays as it starts, C = I; a NaRA gives its core, too.

    Args:
        components: name → the adapted model without PEFT's wrapper; a single one that is no pipeline's has an empty
            name.
        source_model: the pipeline, or the model, by whose class files are read.
        prediction: what the run teaches the model to predict; None for what its base predicts.

    Raises:
        ValueError: the file is no such adapter, or disagrees with the adapters in layers, rank, α, DoRA, core, λ's
            convention or what it predicts; the message says which flag decides that.
    """
    file = Path(path).expanduser()
    origin = f"init_adapter '{path}'"
    if _is_naras(file):
        denoiser = next(iter(components))
        with naming(path):
            parts: dict[str, Any] = AdapterFile.read(file, denoiser).parts
        loras = {name: _without_core(part, origin) for name, part in parts.items()}
    else:
        loras, parts = read_lora(file, source_model)[0], {}
    if loras.keys() != components.keys():
        raise ValueError(
            f"{origin} is for {_names(loras)}, but this run trains {_names(components)}: the text encoders are trained "
            "by --train_text_encoder."
        )
    carried = [each.scheduler for each in loras.values()] + [part.config.scheduler for part in parts.values()]
    _check_prediction(prediction, [fields for fields in carried if fields is not None], not parts, origin)
    for name, root in components.items():
        _check_start(root, adapter_name, loras[name], parts.get(name), origin)
    for name, root in components.items():
        copy_tensors(loras[name], root, adapter_name, origin)
        if name in parts:
            _fill_core(root, adapter_name, parts[name], origin)


def _is_naras(path: Path) -> bool:
    if (path / CONFIG_NAME).is_file():
        return is_naras(read_config_file(path / CONFIG_NAME))
    if (path / WEIGHTS_NAME).is_file():
        return True
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return METADATA_KEY in (file.metadata() or {})
    except SafetensorError:
        return False  # the code that reads the file raises


def _without_core(part: AdapterPart, origin: str) -> PlainLora:
    own = {key: tensor for key, tensor in part.tensors.items() if not is_core_key(key)}
    return lora_of_tensors(part.config, own, origin)


def _check_start(root: Any, adapter_name: str, lora: PlainLora, part: AdapterPart | None, origin: str) -> None:
    config: LoraConfig = root.peft_config[adapter_name]
    if lora.others:
        raise ValueError(f"{origin} has trained '{next(iter(lora.others))}' beside a LoRA, which this run doesn't.")
    if changes_base(lora.config.init_lora_weights):
        raise ValueError(
            f"{origin} started with init_lora_weights {lora.config.init_lora_weights!r}, which takes the start of A "
            "and B out of the base: convert it to a LoRA of the unchanged base first."
        )
    strength = None if part is None else part.config.strength
    if strength is not None and strength != getattr(config, "strength", None):
        raise ValueError(
            f"{origin} has the strength {strength} over λ, and this run no such window: give the same "
            "--min_noise_level and --max_noise_level and --adapter of NaRA's family, or take the strength away first, "
            "set_strength(model, …, None)."
        )
    if part is None or part.config.core_type == "identity":
        if isinstance(config, NaraConfig) and config.core_type != "identity":
            check_identity(root, adapter_name, config)
    else:
        _check_core(config, part.config, origin)


def _check_core(config: LoraConfig, given: NaraConfig, origin: str) -> None:
    if not isinstance(config, NaraConfig):
        raise ValueError(f"{origin} is a NaRA with core_type {given.core_type!r}: give --adapter nara.")
    for name in sorted(CORE_FIELDS - _FREE):
        here, there = getattr(config, name), getattr(given, name)
        if here != there:
            flag = name if name in ("core_type", "core_scale") else f"adapter_options {name}="
            raise ValueError(f"{origin} has {name} {there!r}, this run {here!r}: give --{flag} as in the file.")
    if None not in (config.noise_convention, given.noise_convention) and (
        config.noise_convention != given.noise_convention
    ):
        raise ValueError(
            f"{origin} was trained with λ as {given.noise_convention!r}, this run's is {config.noise_convention!r}: "
            "they are not the same noise levels."
        )


def _check_prediction(wanted: Prediction | None, carried: list[Mapping[str, Any]], is_lora: bool, origin: str) -> None:
    """Compares what the run and the file are for; None, or nothing carried, for what the base predicts. Other
    programs' LoRAs never say."""
    here, there = wanted, prediction_in(carried[0]) if carried else None
    if here != there and (carried or not is_lora):
        raise ValueError(
            f"{origin} was trained for {there or _AS_BASE}, this run is for {here or _AS_BASE}: give --prediction_type "
            "and --rescale_betas_zero_snr as they were."
        )


def _fill_core(root: nn.Module, adapter_name: str, part: AdapterPart, origin: str) -> None:
    tensors = {key.removeprefix(f"{HOLDER_NAME}."): tensor for key, tensor in part.tensors.items() if is_core_key(key)}
    holder = holder_of(root)
    cores: Any = nn.ModuleDict() if holder is None else holder.cores[adapter_name]
    held = cores.state_dict()
    wrong = [key for key in held.keys() | tensors.keys() if key not in held or key not in tensors
             or held[key].shape != tensors[key].shape]  # fmt: skip
    if wrong:
        raise ValueError(f"{origin} has another core than this run's flags describe: '{min(wrong)}' differs.")
    cores.load_state_dict(tensors)


def _names(names: Any) -> str:
    return ", ".join(name or "a single model" for name in names)
