"""The order of the training data, as a function of (seed, position) and nothing else.

Position p of the endless stream is sample π_e[p mod n] of epoch e = ⌊p / n⌋, π_e a permutation drawn from (seed, e).
Optimizer step k takes the G positions k·G … (k+1)·G − 1, G the global batch, whatever the number of processes or of
accumulated forwards; an epoch's last batch is filled from the next epoch, so that each step averages over exactly G
samples. To resume, start at k. With other data, k counts from the step at which these began.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset


class ShuffledStream(Dataset):
    """`stream[p]` is the dict at position p, with its position under the key "position"."""

    def __init__(self, samples: Sequence[dict[str, Any]] | Any, seed: int):
        if len(samples) == 0:
            raise ValueError("there are no training samples: the data is empty.")
        self.samples = samples
        self.seed = seed
        self._epoch = -1
        self._order: list[int] = []

    def sample_at(self, position: int) -> int:
        """The index of the sample at a position."""
        epoch, offset = divmod(position, len(self.samples))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = torch.randperm(len(self.samples), generator=generator).tolist()
            self._epoch = epoch
        return self._order[offset]

    def __getitem__(self, position: int) -> dict[str, Any]:
        return {**self.samples[self.sample_at(position)], "position": position}


def stream_loader(
    stream: Any, collate: Callable[[list[dict]], Any], *, batch_size: int, first: int, stop: int
) -> DataLoader:
    """Batches of consecutive positions from `first` to before `stop`; accelerate deals them out to the processes."""
    # without a generator, the loader draws from the global one when it starts, and a resumed run starts it twice
    generator = torch.Generator().manual_seed(0)
    positions: Any = range(first, stop)
    return DataLoader(stream, batch_size=batch_size, sampler=positions, collate_fn=collate, generator=generator)
