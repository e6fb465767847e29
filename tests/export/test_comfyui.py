"""ComfyUI: the node works on the device; keyframes have the strengths of λ at ComfyUI's percents, in a whole graph."""

from __future__ import annotations

import gc
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nara_diffusion import StrengthSchedule
from nara_diffusion.export.comfyui_workflow import comfyui_workflow, keyframes
from tests.acceptance import _bases
from tests.acceptance._comfyui import comfyui
from tests.acceptance.test_files_comfyui import PIPELINES, sdxl

STEP = StrengthSchedule([(0, 1.0), (0.4, 0.25), (0.4, 0.75), (1, 0.0)])


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
    with comfyui(PIPELINES / "sdxl_float32") as comfy:
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


def level(percent: float, shift: float | None) -> float:
    """ComfyUI's percent_to_sigma: of 1000 discrete steps, t / 1000; of a flow, its shifted σ."""
    if shift is None:
        return (1 - percent) * 999 / 1000
    return shift * (1 - percent) / (1 + (shift - 1) * (1 - percent))


@pytest.mark.parametrize("shift", [None, 1.0, 3.16])
def test_a_keyframe_holds_the_strength_of_its_middle_and_none_spans_a_step(shift: float | None) -> None:
    frames = keyframes(STEP, shift)
    starts = [start for start, _ in frames]
    assert starts[0] == 0
    for (start, strength), end in zip(frames, [*starts[1:], 1.0], strict=True):
        middle = torch.tensor(level((start + end) / 2, shift)).clamp(0, 1)
        assert strength == pytest.approx(STEP(middle).item(), abs=1e-3)
    assert any(abs(level(start, shift) - 0.4) < 1e-3 for start in starts)
    assert all(one < other for one, other in pairwise(starts))


def test_links_of_the_workflow_lead_to_nodes_that_are_there() -> None:
    schedules = {"a.safetensors": STEP, "b.safetensors": StrengthSchedule([(0, 0.5), (1, 1.0)])}
    nodes = comfyui_workflow(schedules, "base.safetensors", always="text.safetensors", patch=("ModelSamplingSD3", {}))
    links = [value for node in nodes.values() for value in node["inputs"].values() if isinstance(value, list)]
    assert {link[0] for link in links} == nodes.keys() - {list(nodes)[-1]}  # all but what saves the image
    kinds = [node["class_type"] for node in nodes.values()]
    assert kinds.count("SetHookKeyframes") == kinds.count("CreateHookLoraModelOnly") == 2
    assert kinds.count("CombineHooks2") == kinds.count("ModelSamplingSD3") == 1
