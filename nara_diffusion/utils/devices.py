"""The device that a user names."""

from __future__ import annotations

import torch


def usable_device(device: str | torch.device) -> torch.device:
    """`device`, after PyTorch has made an empty tensor there.

    Raises:
        ValueError: PyTorch doesn't know such a device, or this machine has none.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # the second where PyTorch was built without CUDA
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device {str(device)!r} can't be used: {reason}; give cpu, or one that is there") from None
