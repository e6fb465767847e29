"""The model that a method trains: by the same function, and the same arguments, as train_scripts/dllm.py."""

from __future__ import annotations

import warnings
from typing import Any

from transformers import PreTrainedModel

from nara_diffusion.training.adapters import build_adapter, check_adapter
from nara_diffusion.training.arguments import AdapterArguments
from quality.options import arguments_of
from quality.text.recipe import Recipe

BASE = "base"
"""The backbone as it is."""


def adapter_arguments(method: str, recipe: Recipe) -> AdapterArguments:
    """`method` at the recipe's rank.

    Raises:
        ValueError: unknown method or argument, or one that the method contradicts.
    """
    values: dict[str, Any] = {"rank": recipe.rank, "target_modules": list(recipe.target_modules), **recipe.adapter}
    args = arguments_of(AdapterArguments, values | {"adapter": method})
    check_adapter(args)
    return args


def adapted(model: PreTrainedModel, method: str, recipe: Recipe) -> Any:
    """`model` with what `method` trains, which requires a gradient; the model itself for "full" and "base"."""
    if method == BASE:
        return model.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        return build_adapter(model, adapter_arguments(method, recipe))
