"""NaRA, noise-aware LoRA, as a PEFT and Diffusers plugin (arXiv 2605.29716)."""

from . import registry
from .config import NaraConfig
from .cores.factorization import shared_factors
from .cores.registry import register_core
from .export import from_lora, to_lora, to_lora_bins
from .noise.denoisers import register_denoiser
from .noise.level import noise_level
from .noise.sources import register_noise_source, set_noise_source
from .noise.strength import StrengthSchedule
from .noise.timesteps import TimestepNoise
from .tuner.inspection import core_matrix
from .tuner.model import NaraModel
from .tuner.strength import set_strength

__version__ = "0.1.0"
__all__ = [
    "NaraConfig",
    "NaraModel",
    "StrengthSchedule",
    "TimestepNoise",
    "__version__",
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
    "to_lora_bins",
]

registry.register()
