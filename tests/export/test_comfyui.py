"""ComfyUI's workflow: keyframes have the strengths of λ at ComfyUI's percents, in a whole graph."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from nara_diffusion import StrengthSchedule
from nara_diffusion.export.host_files import comfyui_workflow, keyframes

STEP = StrengthSchedule([(0, 1.0), (0.4, 0.25), (0.4, 0.75), (1, 0.0)])


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
