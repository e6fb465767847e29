"""What a run of the text benchmark is trained with, beside its method: what all methods of a comparison share."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from quality.suites import RANKS

TOLD = ("sampled", "masked_share")


@dataclass(frozen=True)
class Recipe:
    """Attributes:
    rank: of the adapter; lora_alpha is the same unless `adapter` says otherwise.
    steps, batch_size: of training.
    learning_rate, core_learning_rate: AdamW's peak, for the core another one; both fall along a cosine to zero.
    warmup: share of the steps over which the rates rise.
    core_start_step: steps that train A and B alone, with the core as it began: the paper's two stages.
    complementary: train on each question twice a step, with complementary masks (half as many questions).
    told: the λ that the model is told: the "sampled" one, by which tokens were masked, or the "masked_share" that
        came of it, which is what generation tells.
    target_modules: names of the adapted modules, or "all-linear".
    adapter: further arguments of the adapter, as `train_scripts/dllm.py` has them.
    """

    rank: int = RANKS["text"]
    steps: int = 500
    batch_size: int = 8
    learning_rate: float = 5e-3
    core_learning_rate: float = 1e-3
    warmup: float = 0.05
    core_start_step: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    complementary: bool = False
    told: str = "sampled"
    target_modules: tuple[str, ...] = ("all-linear",)
    adapter: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.told not in TOLD:
            raise ValueError(f"told is {self.told!r}, expected one of {', '.join(TOLD)}")
        for name in ("rank", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 at least")
        if self.complementary and self.batch_size % 2:
            raise ValueError(f"batch_size is {self.batch_size}, but complementary masks make pairs: pass an even one")

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
