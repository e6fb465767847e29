"""Evaluation over several processes: each one computes a share, and all get all results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object

# A forward of these runs on all processes or hangs, so every process does everything.
_TOGETHER = (DistributedType.FSDP, DistributedType.DEEPSPEED)


def split_across_processes(
    accelerator: Accelerator, count: int, work: Callable[[Sequence[int]], Sequence[Any]]
) -> list[Any]:
    """The results for 0 … count − 1, in order, on every process.

    Args:
        count: number of items.
        work: indices → one picklable result for each of them.
    """
    if accelerator.distributed_type in _TOGETHER:
        mine = range(count)
    else:
        mine = range(accelerator.process_index, count, accelerator.num_processes)
    results = dict(gather_object(list(zip(mine, work(mine) if mine else [], strict=True))))
    return [results[i] for i in range(count)]
