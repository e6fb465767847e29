"""NaRA, noise-aware LoRA, as a PEFT and Diffusers plugin (arXiv 2605.29716)."""

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from .config import NaraConfig, NaraPeftType
from .cores.core import shared_factors
from .cores.registry import register_core
from .export import from_lora, to_lora
from .loaders.other_trainers import checkpoint_nara_weights
from .loaders.weights import load_nara_weights, save_nara_weights, unload_nara_weights
from .noise.context import noise_level
from .noise.denoisers import register_denoiser
from .noise.sources import register_noise_source, set_noise_source
from .noise.strength_schedule import StrengthSchedule
from .noise.timesteps import TimestepNoise
from .tuner.inspection import core_matrix
from .tuner.model import NaraModel
from .tuner.strength import set_strength
from .wraps import extend_pipelines, wrap_other_libraries

__version__ = "0.3.0.dev0"
__all__ = [
    "NaraConfig",
    "NaraModel",
    "StrengthSchedule",
    "TimestepNoise",
    "__version__",
    "checkpoint_nara_weights",
    "core_matrix",
    "from_lora",
    "noise_level",
    "register_core",
    "register_denoiser",
    "register_noise_source",
    "set_noise_source",
    "set_strength",
    "shared_factors",
    "to_lora",
]

# `peft.utils.register_peft_method` accepts only names of PEFT's own enum
PEFT_TYPE_TO_CONFIG_MAPPING[NaraPeftType.NARA] = NaraConfig  # type: ignore[index]
PEFT_TYPE_TO_TUNER_MAPPING[NaraPeftType.NARA] = NaraModel  # type: ignore[index]
PEFT_TYPE_TO_PREFIX_MAPPING[NaraPeftType.NARA] = NaraModel.prefix  # type: ignore[index]
extend_pipelines(load_nara_weights, save_nara_weights, unload_nara_weights)
wrap_other_libraries()
