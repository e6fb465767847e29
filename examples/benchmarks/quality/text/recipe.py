"""What a run of the text benchmark trains: its recipe, and the model of a method, as in train_scripts/dllm.py."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from transformers import PreTrainedModel

from nara_diffusion.training.adapters import build_adapter
from nara_diffusion.training.arguments import AdapterArguments
from quality.options import arguments_of
from quality.running import RANK

# ---------------------------------------------------------------------- recipe


@dataclass(frozen=True)
class Recipe:
    """Attributes:
    rank: of the adapter; lora_alpha is the same unless `adapter` says otherwise.
    steps, batch_size: of training.
    learning_rate, core_learning_rate: AdamW's peak, for the core another one; both fall along a cosine to zero.
    warmup: share of the steps over which the rates rise.
    target_modules: names of the adapted modules, or "all-linear".
    adapter: further arguments of the adapter, as `train_scripts/dllm.py` has them.
    """

    rank: int = RANK
    steps: int = 500
    batch_size: int = 8
    learning_rate: float = 5e-3
    core_learning_rate: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    target_modules: tuple[str, ...] = ("all-linear",)
    adapter: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, **settings: Any) -> Recipe:
        """A recipe; `settings` that it doesn't know are arguments of the adapter."""
        own = {key: settings.pop(key) for key in [f.name for f in fields(cls)] if key in settings}
        return cls(**own | {"adapter": {**own.get("adapter", {}), **settings}})

    def settings(self) -> dict[str, Any]:
        """All but what a record names by itself, as JSON has it."""
        named = ("rank", "steps", "learning_rate", "core_learning_rate", "adapter")
        values = {key: value for key, value in asdict(self).items() if key not in named}
        return values | {"target_modules": list(self.target_modules)} | self.adapter


# ---------------------------------------------------------------------- methods

BASE = "base"
"""The backbone as it is."""


def adapted(model: PreTrainedModel, method: str, recipe: Recipe) -> Any:
    """`model` with what `method` trains, which requires a gradient; the model itself for "full" and "base".

    Raises:
        ValueError: unknown method or argument.
    """
    if method == BASE:
        return model.requires_grad_(False)
    values: dict[str, Any] = {"rank": recipe.rank, "target_modules": list(recipe.target_modules), **recipe.adapter}
    args = arguments_of(AdapterArguments, values | {"adapter": method})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        return build_adapter(model, args)
