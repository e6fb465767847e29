"""NaRA, noise-aware LoRA, as a PEFT and Diffusers plugin (arXiv 2605.29716)."""

from . import registry
from .config import NaraConfig
from .conventions import register_noise_source
from .denoisers import TimestepNoise, register_denoiser
from .factors import shared_factors
from .inspection import core_matrix
from .model import NaraModel
from .noise import noise_level, set_noise_source
from .own_cores import register_core
from .set_strength import set_strength
from .strength import StrengthSchedule

__version__ = "0.1.0"
__all__ = [
    "NaraConfig",
    "NaraModel",
    "StrengthSchedule",
    "TimestepNoise",
    "__version__",
    "core_matrix",
    "noise_level",
    "register_core",
    "register_denoiser",
    "register_noise_source",
    "set_noise_source",
    "set_strength",
    "shared_factors",
]

registry.register()
