"""A component that PEFT has wrapped: `pipe.unet = get_peft_model(pipe.unet, …)`, or `PeftModel.from_pretrained`.

It is saved as its base model, which has the adapters. What would change them is refused: the wrapper keeps a record of
its own, such as which of them is active, that only PEFT's methods follow.
"""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import nn

from .adapters import nara_adapters_of


def unwrapped(model: nn.Module) -> nn.Module:
    """The base model, adapters included, of a PeftModel; any other model as it is."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def check_not_wrapped(model: nn.Module, component: str, method: str) -> None:
    """Raises ValueError if `model`, the pipeline's `component`, is a PeftModel, which its `method` cannot serve."""
    if isinstance(model, PeftModel):
        raise ValueError(
            f"{component} is a PeftModel, whose adapters pipe.{method} cannot change. Put its base model, adapters "
            f"included, into the pipeline first, pipe.{component} = pipe.{component}.get_base_model(), or use its own "
            "methods (load_adapter, set_adapter, delete_adapter, unload)."
        )


def check_none_wrapped(pipe: Any, components: list[str], method: str) -> None:
    """Raises ValueError if one of `components` is a PeftModel with a NaRA, which Diffusers' `method` would pass by."""
    for component in components:
        model = getattr(pipe, component, None)
        model = getattr(model, "_orig_mod", model)  # of torch.compile
        if isinstance(model, PeftModel) and nara_adapters_of(model):
            check_not_wrapped(model, component, method)
