"""λ, the noise level: what it is, and how a forward of an adapted model learns it.

λ is a float32 tensor (1,) or (b,) in [0, 1]; 1 is pure noise. It reaches a forward of an adapted model by

1. `with noise_level(model, value): …`, which beats
2. a source set once by `set_noise_source(model, source)`, asked at each forward.
"""

from .level import noise_level
from .needs import is_noise_aware, mask_density_radius, needs_mask_density
from .signals import MASKED_SHARE, Level, NoiseSignals, NoiseSource, as_signals
from .sources import register_noise_source, set_noise_source

__all__ = [
    "MASKED_SHARE",
    "Level",
    "NoiseSignals",
    "NoiseSource",
    "as_signals",
    "is_noise_aware",
    "mask_density_radius",
    "needs_mask_density",
    "noise_level",
    "register_noise_source",
    "set_noise_source",
]
