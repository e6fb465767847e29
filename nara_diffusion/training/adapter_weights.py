"""What weights start from and are saved to: `--init_adapter`, and the files of a language model's fine-tuning.

an adapter         adapter_config.json, adapter_model.safetensors: PEFT's format, for PeftModel.from_pretrained
all weights        config.json, model.safetensors: transformers' format, for load_backbone
in a checkpoint    the same, and for virtual tokens trainable.safetensors: the network that makes P-tuning's
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from nara_diffusion import NaraConfig
from nara_diffusion.config import changes_base
from nara_diffusion.export.from_lora import check_identity, check_scales, copy_tensors
from nara_diffusion.export.plain_lora import PlainLora
from nara_diffusion.export.read_lora import read_lora
from nara_diffusion.loaders.adapter_part import AdapterPart, configured_scaling
from nara_diffusion.loaders.file import AdapterFile, naming
from nara_diffusion.loaders.tensor_files import is_nara, load_whole_model
from nara_diffusion.noise.prediction import check_expected
from nara_diffusion.strict import check_loaded, check_tensors

from .adapters import CORE_FIELDS

TRAINABLE = "trainable.safetensors"

_FREE = {"core_init", "lora_a_init", "noise_convention", "scheduler", "strength"}
"""Fields of a core that say how it starts, or what it was trained for, and not what its tensors mean."""
_SHARED = {"r": "rank", "lora_alpha": "lora_alpha", "core_type": "core_type"}
"""{field: the flag that sets it}; other fields are given by adapter_options."""

# ---------------------------------------------------------------- --init_adapter


def start_from(components: Mapping[str, Any], path: str, source_model: Any) -> None:
    """Copy the tensors of the adapter in `path` into the adapters "default" of `components`, of the same layers.

    A LoRA gives A, B and magnitudes, and the core stays as it starts, C = I; a NaRA gives its core, too.

    Args:
        components: name → the adapted model without PEFT's wrapper; a single one that is no pipeline's has an empty
            name.
        source_model: the pipeline, or the model, by whose class files are read.

    Raises:
        ValueError: the file is no such adapter, or disagrees with the adapters in layers, rank, α, DoRA, core, λ's
            convention or what it predicts; the message says which flag decides that.
    """
    file, origin = Path(path).expanduser(), f"init_adapter '{path}'"
    with naming(path):
        naras = is_nara(file)
        read: Any = (
            AdapterFile.read(file, next(iter(components))).parts
            if naras
            else read_lora(file, source_model)[0]
        )
        _check_parts(read, components, naras, source_model, origin)
        for name, root in components.items():
            (_copy_nara if naras else _copy_lora)(read[name], root, origin)


def _check_parts(
    parts: Mapping[str, Any],
    components: Mapping[str, Any],
    naras: bool,
    source_model: Any,
    origin: str,
) -> None:
    """Refuse a file for other components, or for another prediction, than the run's. Raises ValueError."""
    if parts.keys() != components.keys():
        if "" in components:
            raise ValueError(
                f"{origin} is an image adapter, for {', '.join(parts)}: give one of a language model."
            )
        names = [
            ", ".join(name or "a single model" for name in each) for each in (parts, components)
        ]
        raise ValueError(
            f"{origin} is for {names[0]}, but this run trains {names[1]}: see --train_text_encoder."
        )
    schedulers = [part.config.scheduler if naras else part.scheduler for part in parts.values()]
    for fields in schedulers:
        check_expected(getattr(source_model, "scheduler", None), fields)


def _copy_nara(part: AdapterPart, root: Any, origin: str) -> None:
    _check_same(root.peft_config["default"], part.config, origin)
    scales = {
        name: (rank, configured_scaling(part.config, name, rank))
        for name, rank in part.modules.items()
    }
    check_scales(scales, root, "default", origin)
    set_peft_model_state_dict(root, part.tensors, adapter_name="default")
    check_loaded(root, "default", part.tensors, origin)


def _copy_lora(part: PlainLora, root: Any, origin: str) -> None:
    config = root.peft_config["default"]
    if changes_base(part.config.init_lora_weights):
        raise ValueError(
            f"{origin} took its start out of the base weights, which this run's base still has."
        )
    if isinstance(config, NaraConfig) and config.core_type != "identity":
        check_identity(root, "default", config)
    copy_tensors(part, root, "default", origin)


def _check_same(config: Any, given: NaraConfig, origin: str) -> None:
    """Refuse a NaRA of another configuration than the run's. Raises ValueError."""
    if not isinstance(config, NaraConfig):
        raise ValueError(
            f"{origin} is a NaRA with core_type {given.core_type!r}: give --adapter nara."
        )
    for name in ("r", "lora_alpha", "use_dora", "use_rslora", *sorted(CORE_FIELDS - _FREE)):
        here, there = getattr(config, name), getattr(given, name)
        if here != there:
            flag = _SHARED.get(name, f"adapter_options {name}=")
            raise ValueError(
                f"{origin} has {name} {there!r}, this run {here!r}: give --{flag} as in the file."
            )
    if given.strength != config.strength:
        raise ValueError(
            f"{origin} has the strength {given.strength} over λ, and this run {config.strength}: give the same "
            "--min_noise_level and --max_noise_level, or take the strength away first, set_strength(model, …, None)."
        )
    if (
        None not in (here := config.noise_convention, there := given.noise_convention)
        and here != there
    ):
        raise ValueError(f"{origin} was trained with λ as {there!r}, this run's is {here!r}.")


# ---------------------------------------------------------------- a language model's files


def write_adapter(model: Any, folder: Path, state: dict[str, Any]) -> None:
    """Write what a user loads onto the base model, or instead of it. It is a `checkpoints.Writer`."""
    if isinstance(model, PeftModel):
        # embeddings are the base model's; PEFT would look its configuration up again to find that out
        model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; the run writes its own
    else:
        model.save_pretrained(str(folder), state_dict=state)


def write_checkpoint(model: Any, folder: Path, state: dict[str, Any]) -> None:
    """Write what `load_checkpoint` reads. It is a `checkpoints.Writer`."""
    write_adapter(model, folder, state)
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        tensors = {name: state[name].detach().cpu().contiguous() for name in _trainable(model)}
        save_file(tensors, folder / TRAINABLE)


def load_checkpoint(model: Any, checkpoint: Path) -> None:
    """Load the weights of a checkpoint into `model`, before accelerate wraps it."""
    if (checkpoint / TRAINABLE).is_file():
        tensors, trainable = load_file(checkpoint / TRAINABLE), _trainable(model)
        check_tensors(tensors, trainable)
        for name, parameter in trainable.items():
            parameter.data.copy_(tensors[name])
    elif isinstance(model, PeftModel):
        tensors = load_peft_weights(str(checkpoint), device="cpu")
        set_peft_model_state_dict(model, tensors)
        check_loaded(model, "default", tensors, str(checkpoint))
    else:
        model.load_state_dict(
            load_whole_model(type(model), checkpoint, dtype=model.dtype).state_dict()
        )


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
