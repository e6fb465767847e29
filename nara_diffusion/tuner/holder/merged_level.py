"""The λ at which a model's adapters are merged: an update that depends on λ can be merged at one λ only."""

from __future__ import annotations

import warnings

from torch import Tensor

from nara_diffusion.noise.signals import NoiseSignals

from .batch_signals import of_one_sample
from .per_forward_cores import AdapterCores, check_signals, depend_on_noise

MERGE_REMEDY = "Pass noise_level=…, or merge inside `with noise_level(model, value):`."


class MergedLevel:
    """Attributes:
    signals: λ and mask density (1,) of the merged adapters; None while none that needs λ is merged.
    is_fused: whether `fuse_lora` merged them, and has said that every step runs at this λ.
    is_warned_of: whether it has been said that a source tells another λ.
    """

    def __init__(self) -> None:
        self.signals: NoiseSignals | None = None
        self.is_fused = False
        self.is_warned_of = False

    @property
    def is_binding(self) -> bool:
        """Whether a sampler that has another λ must not run."""
        return self.signals is not None and not self.is_fused

    def choose(self, cores: AdapterCores, active: NoiseSignals | None, remedy: str) -> NoiseSignals | None:
        """The signals, of one sample, at which `cores` are merged; None if they need none.

        Args:
            active: what `noise_level(…)` gives. None takes the signals of what is merged already.
            remedy: the end of the message if both are None.

        Raises:
            ValueError: λ is not known, differs between samples, or is not that of what is merged already.
        """
        if not depend_on_noise(cores):
            return None
        merged, signals = self.signals, active or self.signals
        check_signals(cores, signals, f"a λ-dependent update can only be merged at one λ. {remedy}")
        signals = of_one_sample(signals)  # type: ignore[arg-type]
        if merged is not None and signals.noise_level.item() != merged.noise_level.item():
            raise ValueError(
                f"Adapters are merged at noise_level {merged.noise_level.item():.6g}, not "
                f"{signals.noise_level.item():.6g}: call unmerge_adapter() first."
            )
        return signals

    def warn_of(self, told: Tensor) -> None:
        """Say once that the source of λ tells `told` (b,), if that is another λ than that of the merged adapters."""
        if self.is_warned_of or self.signals is None or bool((told == self.signals.noise_level.to(told.device)).all()):
            return
        self.is_warned_of = True
        levels = ", ".join(f"{level:.6g}" for level in told.tolist())
        warnings.warn(
            f"The adapter is merged at noise_level {self.signals.noise_level.item():.6g}, at which every forward runs, "
            f"but the source tells [{levels}]: call unmerge_adapter() to run at that.",
            UserWarning,
            stacklevel=2,
        )

    def check(self, active: NoiseSignals | None) -> None:
        """Raises ValueError if `noise_level(…)` gives other signals than those of the merged adapters."""
        if active is None or self.signals is None:
            return
        for name, given, fixed in zip(NoiseSignals._fields, active, self.signals, strict=True):
            if given is not None and fixed is not None and not bool((given == fixed.to(given.device)).all()):
                raise ValueError(
                    f"The adapter is merged at {name} {fixed.item():.6g}, but this forward asks for "
                    f"{given.tolist()}: call unmerge_adapter() first."
                )
