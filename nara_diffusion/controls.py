"""The ablations of λ by the name that users know: see `nara_diffusion.noise.ablations`."""

from .noise.ablations import changed_noise, constant_noise, mean_core, reversed_noise, shuffled_noise

__all__ = ["changed_noise", "constant_noise", "mean_core", "reversed_noise", "shuffled_noise"]
