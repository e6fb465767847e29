"""The trained model: the denoiser and, if trained, the text encoders, with their adapters.

The model is one module with one forward, so that hooks, DistributedDataParallel and gradient
accumulation apply to all of it. The adapter in the denoiser reads λ from the denoiser's timestep.
Text encoders run before λ is known, so their adapters have C = I.

Users load its files as follows:

    NaRA's family          pytorch_nara_weights.safetensors   pipe.load_nara_weights(folder)
    lora, dora, rslora     pytorch_lora_weights.safetensors   pipe.load_lora_weights(folder)
      of Wan 2.2           one file for each of `EXPERT_LORAS`, as other programs want them
    PEFT's other adapters  COMPONENT/adapter_config.json, …   PeftModel.from_pretrained(
                                                                  pipe.unet, "folder/unet")

COMPONENT is the name of a trained model in the pipeline: unet, transformer, text_encoder, …. A
checkpoint has the same files, and trainable.safetensors, from which training resumes. This file has
the trained weights and the adapters' buffers, by their names in the model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.training_utils import cast_training_params
from diffusers.utils import logging as diffusers_logging
from peft import (
    LoraConfig,
    PeftConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nara_diffusion import NaraConfig
from nara_diffusion.loaders.components import check_storable
from nara_diffusion.loaders.tensor_files import load_peft_adapter
from nara_diffusion.noise.context import find_holders
from nara_diffusion.strict import check_loaded, check_tensors
from nara_diffusion.training.adapter_weights import TRAINABLE
from nara_diffusion.training.adapters import CORE_FIELDS, check_target_modules
from nara_diffusion.training.engines import recompute_activations

from .families import HIGH, LOW, Family, Placed
from .pipelines import family_of
from .placement import resident

ADAPTER = "default"
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
EXPERT_LORAS = {
    HIGH: "pytorch_lora_weights_high_noise.safetensors",
    LOW: "pytorch_lora_weights_low_noise.safetensors",
}
"""{denoiser of Wan 2.2: the file of its LoRA, with keys of `transformer`}."""


class AdaptedDenoiser(nn.Module):
    """The denoisers of `pipe` with adapters, and its text encoders if `train_text_encoder`.

    The trained weights are float32; all other weights keep their dtype. The modules of `pipe` are
    adapted in place.

    Args:
        pipe: a pipeline of a known family, with frozen weights.
        config: the configuration of the denoiser's adapter, from PEFT or for a NaRA. `text_config`
            derives the configuration for the text encoders.
        family: the family of `pipe`, with the settings of the run; by default with the family's own
            settings.

    Raises:
        ValueError: a target module isn't in the denoiser, or a pipeline couldn't save and load the
            NaRA.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        config: PeftConfig,
        *,
        train_text_encoder: bool = False,
        gradient_checkpointing: bool = False,
        family: Family | None = None,
    ) -> None:
        super().__init__()
        self.family = family_of(pipe) if family is None else family
        if isinstance(config, NaraConfig):
            check_storable(config, self.family.denoiser)
        self.pipe = pipe  # not a module: it saves the adapter and has the tokenizers
        self.config = config
        for name in self.family.trained:
            base = getattr(pipe, name)
            if gradient_checkpointing and not base.is_gradient_checkpointing:
                base.enable_gradient_checkpointing()
            with resident(base):
                setattr(self, name, adapt(base, deepcopy(config)))  # PEFT writes into it
            for holder in find_holders(getattr(self, name)):
                holder.finder.length = pipe.scheduler.config.get("num_train_timesteps")
        for name in self.family.text_encoders if train_text_encoder else ():
            encoder = getattr(pipe, name)
            if gradient_checkpointing:
                recompute_activations(encoder)
            setattr(self, name, adapt(encoder, deepcopy(text_config(config))))

    @property
    def denoiser(self) -> Any:
        """The first trained denoiser, with its adapter."""
        return getattr(self, self.family.trained[0])

    @property
    def components(self) -> dict[str, Any]:
        """The trained models, by their names in the pipeline."""
        names = (*self.family.trained, *self.family.text_encoders)
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters, by name."""
        return {key: value for key, value in self.named_parameters() if value.requires_grad}

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        time_ids: Tensor,
        prompts: list[str] | None = None,
        embeddings: Placed | None = None,
        sources: Sequence[Tensor] = (),
        expert: str | None = None,
    ) -> Tensor:
        """Return the prediction (b, c, h, w), as the objective defines it.

        Args:
            sample: the corrupted latents (b, c, h, w).
            timestep: (b,).
            time_ids: (b, 6).
            prompts: b prompts, if the text encoders are trained.
            embeddings: the prompts' embeddings, `placed`, if the text encoders are frozen.
            sources: latents of the images to edit, each (b, c, h_i, w_i).
            expert: the name of the denoiser to call; None means the first trained one.
        """
        if embeddings is None:
            assert prompts is not None
            embeddings = self.family.encode(self.pipe, prompts)
        denoiser = self.denoiser if expert is None else getattr(self, expert)
        return self.family.predict(denoiser, sample, timestep, time_ids, embeddings, sources)


def adapt(model: nn.Module, config: PeftConfig, name: str = ADAPTER) -> nn.Module:
    """Add the adapter to `model` in place, and return the adapted model.

    The model is returned in PEFT's wrapper if PEFT keeps state there. Adapters are float32. In the
    dtype of the base layer, which PEFT would use, small steps would be lost.
    """
    check_target_modules(model, getattr(config, "target_modules", None))
    adapted = model
    if isinstance(config, LoraConfig):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            inject_adapter_in_model(config, model, adapter_name=name)
    else:
        base: Any = model  # get_peft_model takes any module, but is declared for Transformers' only
        adapted = get_peft_model(base, config, adapter_name=name)
    cast_training_params(adapted)
    return adapted


def text_config(config: PeftConfig) -> PeftConfig:
    """Return the adapter configuration for text encoders: `config` with other targets and C = I.

    C is fixed since text encoders run before λ is known.
    """
    changes: dict[str, Any] = {"target_modules": TEXT_TARGETS}
    if isinstance(config, NaraConfig):
        for field in fields(NaraConfig):
            if field.name in CORE_FIELDS:
                changes[field.name] = field.default
        changes["core_type"] = "identity"
    return replace(config, **changes)


def write_adapter(model: AdaptedDenoiser, folder: Path, state: dict[str, Any]) -> None:
    """Write the files that a user loads into a pipeline.

    This is a `checkpoints.Writer`; it doesn't need `state`.
    """
    if isinstance(model.config, NaraConfig):
        model.pipe.save_nara_weights(folder, adapter_name=ADAPTER)
        return
    if type(model.config) is LoraConfig:
        _write_lora(model, folder)
    else:
        for name, component in model.components.items():
            component.save_pretrained(str(folder / name))


def _write_lora(model: AdaptedDenoiser, folder: Path) -> None:
    """Write a LoRA by PEFT's names.

    `load_lora_weights` skips a part of a file that also has Diffusers' older names.
    """
    files: dict[str, dict[str, Any]] = {LORA_WEIGHTS: model.components}
    if model.family.boundary is not None:
        files = {EXPERT_LORAS[name]: {HIGH: part} for name, part in model.components.items()}
    pipeline: Any = type(model.pipe)  # each family's class has LoRA's methods
    for file, parts in files.items():
        options: dict[str, Any] = {"weight_name": file}
        for name, part in parts.items():
            weights = {}
            tensors = get_peft_model_state_dict(
                part, adapter_name=ADAPTER, save_embedding_layers=False
            )
            for key, tensor in tensors.items():
                if key.endswith("_vector") and name.startswith("text_encoder"):
                    # Transformers looks up DoRA's magnitudes by the full name, which PEFT shortens
                    key += ".weight"
                weights[key] = tensor.detach().cpu().contiguous()
            options[f"{name}_lora_layers"] = weights
            options[f"{name}_lora_adapter_metadata"] = part.peft_config[ADAPTER].to_dict()
        pipeline.save_lora_weights(folder, **options)


def write_checkpoint(model: AdaptedDenoiser, folder: Path, state: dict[str, Any]) -> None:
    """Write the files that `read_checkpoint` reads.

    This is a `checkpoints.Writer`; it doesn't need `state`.
    """
    write_adapter(model, folder, state)
    state = _training_state(model)
    save_file({name: state[name].cpu().contiguous() for name in state}, folder / TRAINABLE)


@torch.no_grad()
def read_checkpoint(model: AdaptedDenoiser, folder: Path) -> None:
    """Load a checkpoint's weights into `model`, before accelerate wraps it."""
    saved, state = load_file(folder / TRAINABLE), _training_state(model)
    check_tensors(saved, state)
    for name, tensor in state.items():
        tensor.copy_(saved[name])


def _training_state(model: AdaptedDenoiser) -> dict[str, Tensor]:
    """Return {name: tensor} of the trained weights and all adapter tensors, to resume from."""
    names = model.trained.keys()
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        is_own = name in names or ADAPTER in name.split(".")
        if is_own and tensor.data_ptr() not in seen:  # VeRA's layers share their projections
            state[name] = tensor
            seen.add(tensor.data_ptr())
    return state


@contextmanager
def adapter_loaded(pipe: Any, folder: Path | None) -> Iterator[None]:
    """Load the adapter in `folder` into `pipe` inside the context, as a user would.

    Args:
        folder: the adapter's folder; None means the base model.

    Raises:
        ValueError: a file in the folder can't be loaded completely.
    """
    family = family_of(pipe)
    with ExitStack() as stack:
        if folder is not None:
            stack.callback(pipe.unload_lora_weights)
            with resident(*(getattr(pipe, name) for name in family.denoisers)):
                files = [folder / name for name in (LORA_WEIGHTS, *EXPERT_LORAS.values())]
                loras = [file for file in files if file.is_file()]
                for file in loras:
                    _load_lora(pipe, file)
                parts = [*family.denoisers, *family.text_encoders]
                folders = {name: folder / name for name in parts if (folder / name).is_dir()}
                for name, part in folders.items():
                    stack.callback(load_peft_adapter(getattr(pipe, name), part).unload)
                if not loras and not folders:
                    pipe.load_nara_weights(folder, adapter_name=ADAPTER)
        yield


def _load_lora(pipe: Any, file: Path) -> None:
    is_low = file.name == EXPERT_LORAS[LOW]
    into = {"load_into_transformer_2": True} if is_low else {}
    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()  # it warns of each text encoder that the file lacks
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            pipe.load_lora_weights(file, adapter_name=ADAPTER, **into)
    finally:
        diffusers_logging.set_verbosity(level)
    tensors = load_file(file)
    for component in {key.partition(".")[0] for key in tensors}:
        prefix = f"{component}."
        keys = [key for key in tensors if key.startswith(prefix)]
        of_part = {key.removeprefix(prefix): tensors[key] for key in keys}
        model = getattr(pipe, LOW if is_low else component)
        check_loaded(model, ADAPTER, of_part, str(file))
