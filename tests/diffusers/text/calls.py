"""What the tests of both pipelines of language models call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def inputs_of(model: nn.Module, argument: str) -> list[Tensor]:
    """What each forward gets as `argument`, copied."""
    seen: list[Tensor] = []

    def before(_: Any, args: Any, kwargs: Any) -> None:
        seen.append((kwargs[argument] if argument in kwargs else args[0]).clone())

    model.register_forward_pre_hook(before, with_kwargs=True)
    return seen


def loaded(pipe: Any, other: Any, folder: Any, name: str = "toy") -> Any:
    pipe.save_nara_weights(folder, adapter_name=name)
    other.load_nara_weights(folder, adapter_name=name)
    return other
