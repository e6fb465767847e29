"""ComfyUI's node works on the device: hooks are put on once, factors are moved once, and both go with the node."""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.acceptance import _bases
from tests.acceptance._comfyui import comfyui
from tests.acceptance.test_files_comfyui import sdxl

FOLDER = Path(__file__).parents[1] / "acceptance" / "files" / "pipelines" / "sdxl_float32"


class Counting(TorchDispatchMode):
    """Counts operations, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def hooks(model: nn.Module) -> list[int]:
    return [count for module in model.modules() if (count := len(module._forward_hooks))]


def test_hooks_and_factors_stay_between_calls_and_leave_with_the_node() -> None:
    with comfyui(FOLDER) as comfy:
        model = sdxl(_bases.unet().to(torch.bfloat16))
        patched, _ = comfy.load(model, "pytorch_nara_weights.safetensors", "sdxl", 1.0, "a CLIP")
        x, context, y = (each.to(torch.bfloat16) for each in _bases.unet_inputs())

        def sample(patcher: Any) -> Counter[str]:
            with Counting() as found:
                patcher.sample(x, patcher.model.model_sampling.sigmas[[700, 300, 20]], context=context, y=y)
            return found.counts

        plain = sample(model)
        first, second = sample(patched), sample(patched)
        adapted = hooks(model.model.diffusion_model)
        assert set(adapted) == {1}
        # of the factors of float32, which the first call converts
        assert first["_to_copy"] - second["_to_copy"] == 2 * len(adapted)
        assert sample(model) == plain  # the same model without the node
        del patched
        gc.collect()
        assert hooks(model.model.diffusion_model) == []
