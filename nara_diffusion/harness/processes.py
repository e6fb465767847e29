"""The processes of `accelerate launch`, or a single one."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import InitProcessGroupKwargs, gather

from nara_diffusion.utils.devices import usable_device

from .loading import default_device


class Processes:
    """Attributes:
    rank: the index of this process, from 0.
    count: the number of processes.
    """

    def __init__(self, device: str | torch.device | None) -> None:
        self.state: PartialState | None = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # some processes wait while others answer longer questions
            timeout = InitProcessGroupKwargs(timeout=timedelta(days=7)).to_kwargs()
            self.state = PartialState(cpu=_is_cpu(device), **timeout)
        self.rank = 0 if self.state is None else self.state.process_index
        self.count = 1 if self.state is None else self.state.num_processes

    def placement(self, device: str | torch.device | None) -> torch.device:
        """The device of this process's model: its own of several processes; or `device`; or an accelerator or the CPU.

        Raises:
            ValueError: PyTorch has no such device.
        """
        if self.state is not None:
            own: Any = self.state.device
            return own
        return usable_device(default_device() if device in (None, "auto") else str(device))

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Concatenate the tensors of all processes."""
        result: Any = gather(tensor) if self.count > 1 else tensor
        return result

    def gather_object(self, value: Any, destination: int = 0) -> list[Any] | None:
        """The values of all processes, on the process `destination`; None on others."""
        if self.count == 1:
            return [value]
        values: list[Any] | None = [None] * self.count if self.rank == destination else None
        torch.distributed.gather_object(value, values, dst=destination)
        return values

    def wait(self) -> None:
        """Wait for all processes."""
        if self.state is not None:
            self.state.wait_for_everyone()


def _is_cpu(device: str | torch.device | None) -> bool:
    return str(device) == "cpu" or not torch.accelerator.is_available()
