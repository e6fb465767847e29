"""Commands in two gloo processes under accelerate's engines, on a CPU.

accelerate offers FSDP2 and DeepSpeed only where it finds a GPU. Here it finds one, whose device is the CPU;
all else is its own code, and PyTorch's and DeepSpeed's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed import TCPStore

from tests.acceptance._commands import Moment, forkserver, run, words

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
ENGINES: dict[str, dict[str, str]] = {
    "ddp": {"ACCELERATE_USE_CPU": "true"},
    "fsdp2": FSDP2 | {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
    "zero-2": {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero-3": {},  # by a file, as small parameters stay whole by default, and a test model has no others
}
ZERO_3 = {
    "bf16": {"enabled": "auto"},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}

needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed")
Command = tuple[str, str, dict[str, Any]]
"""(engine, script, flags)."""


def in_two_processes(commands: Sequence[Command], folder: Path, moment: Moment | None = None) -> None:
    """Run them one after the other; of DeepSpeed, which keeps the groups of its first run's processes, one a call.

    Args:
        moment: when the first process gets a signal.

    Raises:
        ProcessRaisedException: with the line in which a process refuses a command.
    """
    (folder / "zero-3.json").write_text(json.dumps(ZERO_3))
    stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in commands]
    lines = [
        (engine, script, words(**flags), store.port)
        for (engine, script, flags), store in zip(commands, stores, strict=True)
    ]
    forkserver()
    mp.start_processes(_worker, args=(lines, folder, moment), nprocs=2, start_method="forkserver")


def _worker(rank: int, lines: list[tuple[str, str, list[str], int]], folder: Path, moment: Moment | None) -> None:
    plain, prepare_backend = dict(os.environ), PartialState._prepare_backend
    for engine, script, line, port in lines:
        os.environ.clear()
        os.environ.update(plain, **ENGINES[engine], MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        os.environ.update(
            TORCHELASTIC_USE_AGENT_STORE="True", OMP_NUM_THREADS="1", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2"
        )
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        PartialState._prepare_backend = prepare_backend
        if engine != "ddp":
            os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
            PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
        if engine.startswith("zero"):
            _use_deepspeed(engine, folder)
        if moment is not None and rank == 0:
            moment.arm()
        try:
            run(script, *line)
        except SystemExit as stop:
            raise ValueError(stop.code) from None


def _use_deepspeed(engine: str, folder: Path) -> None:
    os.environ.update(ACCELERATE_USE_DEEPSPEED="true", DS_ACCELERATOR="cpu")
    if engine == "zero-3":
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(folder / "zero-3.json")
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a kernel that would take minutes to compile
