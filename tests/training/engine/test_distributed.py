"""Shares of an evaluation. That processes exchange them is tested with the script, on two of them."""

from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from accelerate.utils import DistributedType

from nara_diffusion.training.engine import distributed as module
from nara_diffusion.training.engine.distributed import split_across_processes


def test_one_process_does_everything_in_order() -> None:
    seen = []

    def work(indices):
        seen.extend(indices)
        return [index * index for index in indices]

    assert split_across_processes(Accelerator(cpu=True), 5, work) == [0, 1, 4, 9, 16]
    assert seen == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_shares_make_up_the_whole_whatever_its_size(monkeypatch, count: int) -> None:
    """Three processes in turn, whose exchange is collected by hand; one with no share isn't asked to work."""
    shares: list[list] = []
    monkeypatch.setattr(module, "gather_object", lambda pairs: shares.append(pairs) or [(i, -i) for i in range(count)])
    for rank in range(3):
        engine = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU, process_index=rank, num_processes=3)
        assert split_across_processes(engine, count, lambda indices: [-i for i in indices] if indices else 1 / 0) == [
            -i for i in range(count)
        ]
    assert sorted(pair for share in shares for pair in share) == [(i, -i) for i in range(count)]


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_sharded_models_are_run_by_all_processes_together(monkeypatch, kind: DistributedType) -> None:
    monkeypatch.setattr(module, "gather_object", lambda pairs: pairs + pairs)
    engine = SimpleNamespace(distributed_type=kind, process_index=1, num_processes=2)
    seen = []
    assert split_across_processes(engine, 3, lambda indices: seen.extend(indices) or list(indices)) == [0, 1, 2]
    assert seen == [0, 1, 2]
