"""Write and load the weights of a fine-tuned language model; start from those of --init_adapter.

an adapter         adapter_config.json, adapter_model.safetensors: PEFT's format, for PeftModel
all weights        config.json, model.safetensors: transformers' format, for load_backbone
in a checkpoint    the same files; for virtual tokens also trainable.safetensors, with the weights
                   of P-tuning's network, which computes the tokens
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from nara_diffusion import NaraConfig
from nara_diffusion.config import changes_base
from nara_diffusion.export.from_lora import check_identity, check_scales, copy_tensors
from nara_diffusion.export.read_lora import read_lora
from nara_diffusion.loaders.adapter_part import configured_scaling
from nara_diffusion.loaders.file import AdapterFile, naming
from nara_diffusion.loaders.tensor_files import is_nara, load_whole_model
from nara_diffusion.strict import check_loaded, check_tensors
from nara_diffusion.tuner.twins import with_encoder_layers

from .adapters import CORE_FIELDS

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

TRAINABLE = "trainable.safetensors"


def write_adapter(
    model: PeftModel | PreTrainedModel, folder: Path, state: dict[str, Tensor]
) -> None:
    """Write the adapter, or the whole model, as users load it. A `checkpoints.Writer`."""
    if isinstance(model, PeftModel):
        # the embeddings belong to the base model; PEFT would reload its configuration to check
        model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; the run writes its own
    else:
        model.save_pretrained(str(folder), state_dict=state)


def write_checkpoint(
    model: PeftModel | PreTrainedModel, folder: Path, state: dict[str, Tensor]
) -> None:
    """Write the files that `load_checkpoint` reads. A `checkpoints.Writer`."""
    write_adapter(model, folder, state)
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        tensors = {name: state[name].detach().cpu().contiguous() for name in _trainable(model)}
        save_file(tensors, folder / TRAINABLE)


def load_checkpoint(model: nn.Module, checkpoint: Path) -> None:
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
        assert isinstance(model, PreTrainedModel)
        loaded = load_whole_model(type(model), checkpoint, dtype=model.dtype)
        model.load_state_dict(loaded.state_dict())


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }


_FREE = {
    "core_init",
    "few_steps",
    "lora_a_init",
    "noise_convention",
    "noise_level_per",
    "strength",
}
"""Fields of a core that may differ: they don't change the meaning of its tensors."""
_FLAGS = {"r": "rank", "lora_alpha": "lora_alpha", "core_type": "core_type"}
"""{field: the flag that sets it}. The other fields are set by --adapter_options."""


def start_from(
    components: Mapping[str, nn.Module],
    path: str,
    source_model: DiffusionPipeline | PreTrainedModel,
) -> None:
    """Copy the adapter in `path` into the adapter "default" of each component.

    Both must adapt the same layers. A LoRA sets A, B and the magnitudes, and the core keeps its
    initial value, C = I. A NaRA also sets the core.

    Args:
        components: {name: adapted model without PEFT's wrapper}. The name is empty for a model that
            isn't part of a pipeline.
        source_model: the pipeline or model. Its class decides how the file of a LoRA is read.

    Raises:
        ValueError: the file has no such adapter, or its layers, rank, α, DoRA, core, definition of
            λ differ from the run's. The message names the flag to change.
    """
    file, origin = Path(path).expanduser(), f"init_adapter '{path}'"
    configs = {name: cast(Any, root).peft_config["default"] for name, root in components.items()}
    with naming(path):
        if is_nara(file):
            naras = AdapterFile.read(file, next(iter(components))).parts
            _check_components(list(naras), list(components), origin)
            for name, root in components.items():
                part = naras[name]
                _check_same(configs[name], part.config, origin)
                scales = {
                    layer: (rank, configured_scaling(part.config, layer, rank))
                    for layer, rank in with_encoder_layers(root, part.config, part.modules).items()
                }
                check_scales(scales, root, "default", origin)
                set_peft_model_state_dict(root, part.tensors, adapter_name="default")
                check_loaded(root, "default", part.tensors, origin)
            return
        loras = read_lora(file, source_model)
        _check_components(list(loras), list(components), origin)
        for name, root in components.items():
            config = configs[name]
            if changes_base(loras[name].config.init_lora_weights):
                raise ValueError(
                    f"{origin} was initialised by changing the base weights, but this run's base is unchanged."
                )
            if isinstance(config, NaraConfig) and config.core_type != "identity":
                check_identity(root, "default", config)
            copy_tensors(loras[name], root, "default", origin)


def _check_components(saved: Sequence[str], trained: Sequence[str], origin: str) -> None:
    """Raise ValueError if the file and the run adapt different components."""
    if set(saved) == set(trained):
        return
    if "" in trained:
        raise ValueError(
            f"{origin} is an image adapter, for {', '.join(saved)}. Give an adapter of a language model."
        )
    names = ", ".join(name or "a single model" for name in saved)
    raise ValueError(
        f"{origin} is for {names}, but this run trains {', '.join(trained)}. See --train_text_encoder."
    )


def _check_same(config: PeftConfig, saved: NaraConfig, origin: str) -> None:
    """Raise ValueError if the configuration of a NaRA differs from that of the run's adapter."""
    if not isinstance(config, NaraConfig):
        raise ValueError(
            f"{origin} is a NaRA with core_type {saved.core_type!r}. Use --adapter nara."
        )
    for name in ("r", "lora_alpha", "use_dora", "use_rslora", *sorted(CORE_FIELDS - _FREE)):
        if getattr(config, name) != getattr(saved, name):
            flag = _FLAGS.get(name, f"adapter_options {name}=")
            raise ValueError(
                f"{origin} has {name} {getattr(saved, name)!r}, but this run has {getattr(config, name)!r}. Give "
                f"--{flag} as in the file."
            )
    if saved.strength != config.strength:
        raise ValueError(
            f"{origin} has the strength {saved.strength} over λ, but this run has {config.strength}. Give the same "
            "--min_noise_level and --max_noise_level, or remove the strength first with set_strength(model, …, None)."
        )
    conventions = {saved.noise_convention, config.noise_convention} - {None}
    if len(conventions) > 1:
        raise ValueError(
            f"{origin} was trained with λ as {saved.noise_convention!r}, but this run has {config.noise_convention!r}."
        )
