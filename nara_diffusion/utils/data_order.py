"""The order of the training data.

It depends only on (seed, position). Position p of the endless stream is sample
π_e[p mod n] of epoch e = ⌊p / n⌋, where π_e is a permutation drawn from (seed, e). Optimizer step k
takes the G positions k·G … (k+1)·G − 1, where G is the global batch, for any number of processes or
accumulated forwards. The last batch of an epoch is filled up from the next epoch, so that all
forwards have the same number of samples. A run that resumes starts at its step k. If its data have
changed, k counts from the first step with the new data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset


class ShuffledStream(Dataset):
    """An endless stream of samples: `stream[p]` is a dict with p as its "position"."""

    def __init__(self, samples: Sequence[dict[str, Any]] | Any, seed: int):
        if len(samples) == 0:
            raise ValueError("there are no training samples: the data is empty.")
        self.samples = samples
        self.seed = seed
        self._epoch = -1
        self._order: list[int] = []

    def sample_at(self, position: int) -> int:
        """Return the index of the sample at a position."""
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
    """Return a loader for positions `first` … `stop` − 1; accelerate splits it among processes."""
    # without a generator, each start draws from the global one, and a resumed run starts twice
    generator = torch.Generator().manual_seed(0)
    positions: Any = range(first, stop)
    return DataLoader(
        stream, batch_size=batch_size, sampler=positions, collate_fn=collate, generator=generator
    )
