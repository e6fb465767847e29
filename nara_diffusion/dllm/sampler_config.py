"""The settings of the sampler, checked before anything runs."""

from __future__ import annotations

from dataclasses import dataclass

REMASKING = ("low_confidence", "random")


@dataclass(frozen=True)
class Sampling:
    """The settings of `generate`, checked.

    Raises:
        ValueError: a value is out of its range, or two settings contradict each other.
    """

    gen_length: int
    steps: int | None
    block_length: int
    temperature: float
    cfg_scale: float
    remasking: str
    confidence_threshold: float | None

    def __post_init__(self) -> None:
        if self.gen_length < 1:
            raise ValueError(f"gen_length is {self.gen_length}, expected 1 at least")
        if self.block_length < 1 or self.gen_length % self.block_length:
            raise ValueError(
                f"block_length {self.block_length} doesn't divide gen_length {self.gen_length}, as it has to"
            )
        blocks = self.gen_length // self.block_length
        if self.steps is not None and (self.steps < blocks or self.steps % blocks):
            raise ValueError(
                f"steps is {self.steps} and there are {blocks} blocks: pass a multiple of {blocks}, e.g. {blocks} or "
                f"{self.gen_length}"
            )
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}, expected 0 (greedy) or more")
        if not 0 <= self.cfg_scale < float("inf"):
            raise ValueError(f"cfg_scale is {self.cfg_scale}, expected 0 (no guidance) or more")
        if self.remasking not in REMASKING:
            raise ValueError(f"remasking is {self.remasking!r}, expected one of {', '.join(map(repr, REMASKING))}")
        if self.confidence_threshold is not None:
            if not 0 <= self.confidence_threshold <= 1:
                raise ValueError(f"confidence_threshold is {self.confidence_threshold}, expected a probability")
            if self.steps is not None or self.remasking != "low_confidence":
                raise ValueError(
                    "confidence_threshold decides itself how many tokens a step places, by their confidence: leave out "
                    "steps, and use remasking='low_confidence'"
                )

    def tokens_per_step(self) -> list[int] | None:
        """The number of tokens that each step of a block fills, in descending order; None if confidence decides."""
        if self.confidence_threshold is not None:
            return None
        steps = (self.steps or self.gen_length) // (self.gen_length // self.block_length)
        whole, rest = divmod(self.block_length, steps)
        return [whole + (step < rest) for step in range(steps)]

    @property
    def is_random(self) -> bool:
        """Whether the sampler draws random numbers."""
        return self.temperature > 0 or self.remasking == "random"
