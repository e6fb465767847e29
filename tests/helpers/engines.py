"""Two processes on CPU under each of accelerate's engines, FSDP2 and DeepSpeed included.

accelerate offers both where it finds a GPU alone: told that there is one, and that the device is the CPU nevertheless,
all else is its own code, and PyTorch's and DeepSpeed's, on gloo.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from torch.distributed import TCPStore

_FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
_DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
ENGINES: dict[str, dict[str, str]] = {
    "ddp": {"ACCELERATE_USE_CPU": "true"},
    "fsdp": _FSDP | {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
    "fsdp, full states": _FSDP | {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"},
    "fsdp, loaded once": _FSDP | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
    "zero-2": _DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero-3": _DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
    # small parameters stay whole by default, and a test model has no others
    "zero-3, all sharded": _DEEPSPEED
    | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(Path(__file__).with_name("zero_3_all_sharded.json"))},
}
HAS_DEEPSPEED = find_spec("deepspeed") is not None

Run = tuple[str, Any]
"""(engine, what it is to run)."""


def in_two_processes(work: Callable[[Any], None], runs: Sequence[Run]) -> None:
    """Calls `work` with each run, one after the other, in both of two processes.

    DeepSpeed keeps the groups of processes of its first run, so it takes two new processes for each.

    They meet at a store that is open before they start, as torchrun's do: of a port that is merely free now, nobody
    knows who has it by then.
    """
    stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in runs]
    numbered = [(*run, store.port) for run, store in zip(runs, stores, strict=True)]
    mp.spawn(_worker, args=(work, numbered), nprocs=2)


def _worker(rank: int, work: Callable[[Any], None], runs: Sequence[tuple[str, Any, int]]) -> None:
    plain, prepare_backend = dict(os.environ), PartialState._prepare_backend
    for engine, run, port in runs:
        os.environ.clear()
        os.environ.update(plain, **ENGINES[engine], MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2")
        os.environ.update(
            TORCHELASTIC_USE_AGENT_STORE="True",
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            LOCAL_WORLD_SIZE="2",
            OMP_NUM_THREADS="1",
        )
        PartialState._prepare_backend = prepare_backend
        if engine != "ddp":
            os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
            PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
        if engine.startswith("zero"):
            _leave_kernels_out()
        work(run)
        AcceleratorState._reset_state(True)
        GradientState._reset_state()


def _leave_kernels_out() -> None:
    """DeepSpeed would compile one for reductions over shared memory, which takes minutes, and needs a compiler."""
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False
