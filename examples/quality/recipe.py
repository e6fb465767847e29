"""What a run is trained with, beside its method: everything that all methods of a comparison have in common."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

TOLD = ("sampled", "masked_share")
CONTROLS = (None, "constant", "shuffled")


@dataclass(frozen=True)
class Recipe:
    """Attributes:
    rank: of the adapter; lora_alpha is the same.
    steps, batch_size: of training.
    learning_rate, core_learning_rate: AdamW's peak, for the core another one; both fall along a cosine to zero.
    warmup: share of the steps with a rising rate.
    told: the λ that the model is told: the "sampled" one, by which tokens were masked, or the "masked_share" that
        came of it, which is what generation tells.
    control: the λ that the model is told in training is 0.5 ("constant"), or another sample's of the batch
        ("shuffled"). "constant" is told 0.5 in evaluation too.
    adapter: further fields of the adapter's configuration.
    """

    rank: int = 4
    steps: int = 300
    batch_size: int = 32
    learning_rate: float = 1e-2
    core_learning_rate: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    complementary: bool = False
    target_modules: str | list[str] = "all-linear"
    told: str = "sampled"
    control: str | None = None
    adapter: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, choices in (("told", TOLD), ("control", CONTROLS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {choices}")

    @classmethod
    def of(cls, **settings: Any) -> Recipe:
        """A recipe whose unknown `settings` are fields of the adapter."""
        own = {key: settings.pop(key) for key in [f.name for f in fields(cls)] if key in settings}
        return cls(**own | {"adapter": {**own.get("adapter", {}), **settings}})
