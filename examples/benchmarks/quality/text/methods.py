"""The model that a method trains: by the same function, and the same arguments, as train_scripts/dllm.py."""

from __future__ import annotations

import warnings
from dataclasses import fields
from typing import Any

from transformers import PreTrainedModel

from nara_diffusion.training.adapters.build import build_adapter
from nara_diffusion.training.adapters.method_arguments import check_method
from nara_diffusion.training.adapters.methods import METHODS
from nara_diffusion.training.arguments.common import AdapterArguments
from quality.text.recipe import Recipe

BASE = "base"
"""The backbone as it is."""


def adapter_arguments(method: str, recipe: Recipe) -> AdapterArguments:
    """`method` at the recipe's rank.

    Raises:
        ValueError: unknown method or argument, or one that the method contradicts.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(METHODS)}, {BASE}")
    known = {field.name for field in fields(AdapterArguments)}
    unknown = sorted(recipe.adapter.keys() - known)
    if unknown:
        raise ValueError(f"{', '.join(unknown)} is neither a field of Recipe nor an argument of an adapter: {known}")
    values: dict[str, Any] = {"rank": recipe.rank, "target_modules": list(recipe.target_modules), **recipe.adapter}
    args = AdapterArguments(adapter=method, **values)
    check_method(args)
    return args


def adapted(model: PreTrainedModel, method: str, recipe: Recipe) -> Any:
    """`model` with what `method` trains, which requires a gradient; the model itself for "full" and "base"."""
    if method == BASE:
        return model.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        return build_adapter(model, adapter_arguments(method, recipe), total_steps=recipe.steps)
