"""Which adapters are active and enabled: the same in all layers of a model and in its holder of cores.

As an active adapter is deleted, each of PEFT's layers activates the first of the others that it has itself. Where
adapters have different layers, the layers and the holder would run different ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .injection import trainable_again


def tuner_layers(model: nn.Module) -> list[Any]:
    """PEFT's layers of all kinds, with the holder of the cores."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def deleting(models: Sequence[nn.Module], adapter_names: str | Iterable[str]) -> Iterator[None]:
    """Around what deletes adapters: those of the active ones that stay are active afterwards, or one other, or none.

    The other one is active in all `models` that lose theirs: what is active in another of them, or else the first by
    name. None is where an adapter is fused, beside which another would have no effect in the layers of both. After an
    error inside, all is as before.
    """
    gone = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
    before = [(layer, layer.active_adapters) for model in models for layer in tuner_layers(model)]
    with ExitStack() as undo:
        for model in models:
            undo.enter_context(trainable_again(model))
        try:
            _activate_others(models, gone)
            yield
        except BaseException:
            for layer, names in before:
                layer._active_adapter = names
            raise


def _activate_others(models: Sequence[nn.Module], gone: set[str]) -> None:
    active = [_active(model) for model in models]
    left = [[name for name in names if name not in gone] for names in active]
    other = next(filter(None, left), []) or next(filter(None, (_first(model, gone) for model in models)), [])
    for model, before, names in zip(models, active, left, strict=True):
        if gone.isdisjoint(before):
            continue
        chosen = names or ([] if _is_fused(model) else other)
        if chosen and not names:
            warnings.warn(
                f"Adapter {', '.join(before)} was active which is now deleted. Setting active adapter to "
                f"{', '.join(chosen)}.",
                stacklevel=2,
            )
        for layer in tuner_layers(model):
            layer.set_adapter(list(chosen))


def _active(model: nn.Module) -> list[str]:
    return next((layer.active_adapters for layer in tuner_layers(model)), [])


def _is_fused(model: nn.Module) -> bool:
    return any(layer.merged for layer in tuner_layers(model))


def _first(model: nn.Module, gone: set[str]) -> list[str]:
    return sorted(getattr(model, "peft_config", {}).keys() - gone)[:1]
