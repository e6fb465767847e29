"""How much of the records fits into `max_length` tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MOST = 0.9  # the share of the records that the max_length which messages suggest holds whole


@dataclass(frozen=True)
class Fit:
    """Attributes:
    lengths: (tokens of the prompt, tokens of the answer and its end) of each record.
    max_length: tokens of both together, at most.
    records: the name of the records in messages.
    """

    lengths: Sequence[tuple[int, int]]
    max_length: int
    records: str

    @property
    def dropped(self) -> int:
        """The number of records whose prompt leaves no room for an answer."""
        return sum(prompt >= self.max_length for prompt, _ in self.lengths)

    @property
    def truncated(self) -> int:
        """The number of records whose answer is cut."""
        return sum(prompt < self.max_length < prompt + answer for prompt, answer in self.lengths)

    @property
    def longest(self) -> int:
        """The number of tokens of the longest record that is kept, after cutting."""
        kept = [prompt + answer for prompt, answer in self.lengths if prompt < self.max_length]
        return min(max(kept, default=0), self.max_length)

    @property
    def longest_prompt(self) -> int:
        """The number of tokens of the longest prompt that is kept."""
        return max((prompt for prompt, _ in self.lengths if prompt < self.max_length), default=0)

    def check(self) -> None:
        """Raises ValueError where no record is left."""
        if self.dropped == len(self.lengths):
            raise ValueError(
                f"none of {self.records} is left: their prompts alone have {self.max_length} tokens (max_length) or "
                f"more; {self._wanted()}: give --max_length that"
            )

    def summary(self) -> str:
        """One line for a log."""
        kept = len(self.lengths) - self.dropped
        counts = f"{self.records}: {kept} kept, {self.truncated} of them cut, {self.dropped} dropped"
        if not self.loses:
            return counts
        held = sum(min(answer, max(self.max_length - prompt, 0)) for prompt, answer in self.lengths)
        share = 100 * held / sum(answer for _, answer in self.lengths)
        return f"{counts}; max_length {self.max_length} holds {share:.0f} % of their answers' tokens; {self._wanted()}"

    @property
    def loses(self) -> bool:
        """Whether anything is cut or dropped."""
        return bool(self.truncated or self.dropped)

    def _wanted(self) -> str:
        needed = sorted(prompt + answer for prompt, answer in self.lengths)
        return f"9 of 10 records have {needed[int(MOST * (len(needed) - 1))]} tokens or fewer"
