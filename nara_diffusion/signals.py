"""What a forward is told about noise, checked against the model, the adapter and the batch that it is told for."""

from __future__ import annotations

import inspect
from copy import copy
from typing import Any

from torch import Tensor, nn

from .config import NaraConfig
from .cores import needs_noise
from .noise import NoiseSignals, NoiseSource
from .offload import compute_device


def of_one_sample(signals: NoiseSignals) -> NoiseSignals:
    """The signals of a batch whose samples agree, as those of one sample."""
    for name, signal in zip(NoiseSignals._fields, signals, strict=True):
        if signal is not None and signal.unique().numel() > 1:
            raise ValueError(f"{name} is {signal.tolist()}: merging needs a single value.")
    level, density = signals
    return NoiseSignals(level[:1].detach(), None if density is None else density[:1].detach())


def of_adapter(adapter_name: str, signals: NoiseSignals | None, served_by: list[str] | None) -> NoiseSignals | None:
    """The signals of those samples that the adapter serves; `served_by` names, under PEFT's `adapter_names`, each's."""
    if served_by is None or signals is None:
        return signals
    rows = [index for index, name in enumerate(served_by) if name == adapter_name]

    def pick(signal: Tensor | None) -> Tensor | None:
        if signal is None or signal.shape[0] == 1:
            return signal
        if signal.shape[0] != len(served_by):
            raise ValueError(f"noise_level has {signal.shape[0]} values, but adapter_names has {len(served_by)}.")
        return signal[rows]

    return NoiseSignals(pick(signals.noise_level), pick(signals.mask_density))  # type: ignore[arg-type]


def arguments_of(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """What was passed to a forward of `module`, by name, in the order of its signature."""
    given = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments
    return dict(list(given.items())[1:])


def check_batch(signals: NoiseSignals, source: NoiseSource | None, arguments: dict[str, Any]) -> None:
    """Where layers may see multiples of the batch, λ has to fit the batch of the root: the rows of its first tensor."""
    timestep = getattr(source, "argument", None)
    rows = (len(value) for name, value in arguments.items() if name != timestep and _is_batch(value))
    values, batch = len(signals.noise_level), next(rows, None)
    if values not in (1, batch):
        raise ValueError(
            f"noise_level has {values} values, but the batch is {batch}: pass one value, or one a sample of the batch "
            "as the model sees it (after CFG or repeats)."
        )


def _is_batch(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def check_convention(source: NoiseSource | None, adapter_name: str, convention: str | None) -> None:
    told = getattr(source, "convention", None)
    if source is None or convention is None or told == convention:
        return
    raise ValueError(
        f"Adapter '{adapter_name}' was trained with λ defined as {convention!r}, but the source of λ tells "
        f"{told!r}: use a source of the same convention. If that is a definition of your own, say how λ is told by it "
        "before the model's first adapter is added: register_noise_source(source)."
    )


def with_convention(config: NaraConfig, source: NoiseSource | None, adapter_name: str) -> NaraConfig:
    """`config` with the convention of the model's source of λ, if it names none itself and needs λ.

    Raises:
        ValueError: it names another.
    """
    check_convention(source, adapter_name, config.noise_convention)
    if config.noise_convention is not None or source is None or not needs_noise(config):
        return config
    config = copy(config)  # the caller's may serve several models
    config.noise_convention = getattr(source, "convention", None)
    return config


def denoiser_hint(root: nn.Module) -> str:
    kinds = [kind.__name__ for kind in type(root).__mro__]
    if "ModelMixin" not in kinds:  # of Diffusers
        return ""
    return f" To have it read its timestep, declare register_denoiser('{kinds[0]}', meaning) before adding adapters."


def on_device_of(core: nn.Module, signals: NoiseSignals | None) -> tuple[Tensor | None, Tensor | None]:
    """λ and the mask density where `core` computes."""
    assert signals is not None
    level, density = signals
    device = compute_device(core) or level.device
    return level.to(device), None if density is None else density.to(device)
