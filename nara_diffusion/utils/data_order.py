"""The order of the training data.

It depends only on (seed, position). Position p of the endless stream is sample
π_e[p mod n] of epoch e = ⌊p / n⌋, where π_e is a permutation drawn from (seed, e). Optimizer step k
takes the G positions k·G … (k+1)·G − 1, where G is the global batch, for any number of processes or
accumulated forwards. The last batch of an epoch is filled up from the next epoch, so that all
forwards have the same number of samples. A run that resumes starts at its step k. If its data have
changed, k counts from the first step with the new data.

With `grouped_by_length`, an epoch's samples are put into batches by their lengths after they are
permuted. Each sample still has one position in each epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

_WINDOW = 2048  # samples that are sorted together
_WINDOWS = 4  # in an epoch, at least: otherwise each epoch would have the same batches


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
            self._order, self._epoch = self.order_of(epoch), epoch
        return self._order[offset]

    def order_of(self, epoch: int) -> list[int]:
        """Return the indices of the samples in the order of an epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.samples), generator=generator).tolist()

    def __getitem__(self, position: int) -> dict[str, Any]:
        return {**self.samples[self.sample_at(position)], "position": position}


def grouped_by_length(
    samples: Sequence[int], lengths: np.ndarray, batch: int, first: int, seed: tuple[int, int]
) -> list[int]:
    """Return the samples of an epoch in batches of similar lengths.

    The samples of whole batches are cut into windows. Each window is sorted by length and cut into
    batches, and all batches are shuffled. The samples before the first whole batch of the epoch and
    after the last one share their batches with other epochs. They are only sorted.

    Args:
        samples: indices of samples, already permuted.
        lengths: the length of each sample, by its index.
        batch: the number of samples in a global batch.
        first: the position of the epoch's first sample.
        seed: the seed of the shuffled batches.
    """
    order = np.array(samples)
    start = min(-first % batch, len(order))
    stop = start + (len(order) - start) // batch * batch
    batches = order[start:stop].reshape(-1, batch)
    windows = max(_WINDOWS, batches.size // _WINDOW)
    parts = [order[:start], order[stop:]]
    parts += np.array_split(batches, max(1, min(windows, len(batches))))
    parts = [part.flatten() for part in parts]
    head, tail, *parts = [part[np.argsort(lengths[part], kind="stable")] for part in parts]
    batches = np.concatenate(parts).reshape(-1, batch)
    shuffled = np.random.default_rng(seed).permutation(batches)
    return np.concatenate([head, shuffled.flatten(), tail]).tolist()


def stream_loader(
    stream: Any, collate: Callable[[list[dict]], Any], batch_size: int, positions: Sequence[int]
) -> DataLoader:
    """Return a loader for `positions` of the stream; accelerate splits it among processes."""
    # without a generator, each start draws from the global one, and a resumed run starts twice
    generator = torch.Generator().manual_seed(0)
    return DataLoader(
        stream, batch_size, sampler=positions, collate_fn=collate, generator=generator
    )
