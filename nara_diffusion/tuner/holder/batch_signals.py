"""λ and the mask density of a batch: selected for an adapter, a device or a merge, and compared with the batch size."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nara_diffusion.noise.signals import NoiseSignals, NoiseSource
from nara_diffusion.runtime.offloading import compute_device


def of_one_sample(signals: NoiseSignals) -> NoiseSignals:
    """The signals (1,) of a batch whose samples all have the same.

    Raises:
        ValueError: they differ.
    """
    for name, signal in zip(NoiseSignals._fields, signals, strict=True):
        if signal is not None and signal.unique().numel() > 1:
            raise ValueError(f"{name} is {signal.tolist()}: merging needs a single value.")
    level, density = signals
    return NoiseSignals(level[:1].detach(), None if density is None else density[:1].detach())


def of_adapter(adapter_name: str, signals: NoiseSignals | None, names: list[str] | None) -> NoiseSignals | None:
    """The signals of the samples whose adapter this is. `names`: PEFT's `adapter_names`, one for each sample."""
    if names is None or signals is None:
        return signals
    rows = [index for index, name in enumerate(names) if name == adapter_name]

    def pick(signal: Tensor | None) -> Tensor | None:
        if signal is None or signal.shape[0] == 1:
            return signal
        if signal.shape[0] != len(names):
            raise ValueError(f"noise_level has {signal.shape[0]} values, but adapter_names has {len(names)}.")
        return signal[rows]

    return NoiseSignals(pick(signals.noise_level), pick(signals.mask_density))  # type: ignore[arg-type]


def check_batch(signals: NoiseSignals, source: NoiseSource | None, arguments: dict[str, Any]) -> None:
    """Compare the number of values with the batch of the root, the rows of its first tensor argument.

    Layers cannot do it where they may see multiples of the batch.

    Raises:
        ValueError: there is neither one value nor one a sample.
    """
    timestep = getattr(source, "argument", None)
    rows = (len(value) for name, value in arguments.items() if name != timestep and _is_batch(value))
    values, batch = len(signals.noise_level), next(rows, None)
    if values not in (1, batch):
        raise ValueError(
            f"noise_level has {values} values, but the batch is {batch}: pass one value, or one a sample of the batch "
            "as the model sees it (after CFG or repeats)."
        )


def check_one_level(signals: NoiseSignals, root: nn.Module) -> None:
    """Where layers don't see samples first, no C can go to one of them: the batch has to share its λ."""
    if len(signals.noise_level) > 1:
        raise ValueError(
            f"noise_level has {len(signals.noise_level)} values, but the layers of {type(root).__name__} see tokens "
            "where others see samples, so that each cannot get its own C: let the batch share one λ, or run its "
            "samples one by one."
        )


def _is_batch(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def on_device_of(core: nn.Module, signals: NoiseSignals | None) -> tuple[Tensor | None, Tensor | None]:
    """λ and the mask density on the device on which `core` computes."""
    assert signals is not None
    level, density = signals
    device = compute_device(core) or level.device
    return level.to(device), None if density is None else density.to(device)
