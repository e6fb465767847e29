"""A ComfyUI workflow of several LoRAs whose strengths follow λ, by keyframes at percents of sampling.

ComfyUI's percent is the model's own time, 0 at pure noise, 1 at the image:

    discrete (SD 1.5, SDXL)      λ = t / N,   percent = 1 − t / (N − 1)
    flow (SD3, FLUX)             λ = σ = a s / (1 + (a − 1) s),   percent = 1 − s       a: the model's shift
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch

from nara_diffusion.noise.strength_schedule import StrengthSchedule

LEVELS = 1000
KEYFRAMES = 50
"""The number of equally spaced keyframes: ComfyUI holds a keyframe's strength until the next one."""
_STEP = 1e-6
"""Two points of a schedule that are nearer in λ than this are a step: the same λ, or neighbouring float32 numbers."""


def percent_of(level: float, shift: float | None = None) -> float:
    """ComfyUI's percent at λ, in [0, 1], 0 = pure noise; `shift` a ≥ 1 of a flow, None for a discrete schedule."""
    if shift is None:
        return min(max(1 - level * LEVELS / (LEVELS - 1), 0.0), 1.0)
    return 1 - level / (shift - (shift - 1) * level)


def level_of(percent: float, shift: float | None = None) -> float:
    """λ at ComfyUI's percent: the inverse of `percent_of`."""
    share = 1 - percent
    return share * (LEVELS - 1) / LEVELS if shift is None else shift * share / (1 + (shift - 1) * share)


def keyframes(schedule: StrengthSchedule, shift: float | None = None, count: int = KEYFRAMES) -> list[list[float]]:
    """[start percent, strength] of each keyframe, which holds the strength at its middle; none spans a step."""
    steps = {
        round(percent_of(level, shift), 6)
        for (level, _), (following, _) in pairwise(schedule.points)
        if following - level < _STEP
    }
    starts = sorted({*(index / count for index in range(count)), *(step for step in steps if step < 1)})
    levels = [level_of((start + end) / 2, shift) for start, end in pairwise([*starts, 1.0])]
    values = schedule.at(torch.tensor(levels, dtype=torch.float32).clamp(0, 1)).tolist()
    found = [[start, round(value, 4) + 0.0] for start, value in zip(starts, values, strict=True)]
    return [frame for index, frame in enumerate(found) if index == 0 or frame[1] != found[index - 1][1]]


def comfyui_workflow(
    schedules: Mapping[str, StrengthSchedule],
    checkpoint: str,
    shift: float | None = None,
    always: str | None = None,
    patch: tuple[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """A text-to-image workflow in ComfyUI's API format, with LoRA hooks whose keyframes follow the schedules.

    Args:
        schedules: {file in models/loras: its strength over λ}.
        checkpoint: a file in models/checkpoints.
        shift: as for `percent_of`.
        always: a file in models/loras with LoRAs of the text encoders, which have strength 1 at each step; None: none.
        patch: the node that sets what the model predicts, and its inputs, as of `comfyui_node`; None: as its base.
    """
    nodes: dict[str, Any] = {}

    def node(kind: str, **inputs: Any) -> str:
        nodes[str(len(nodes) + 1)] = {"class_type": kind, "inputs": inputs}
        return str(len(nodes))

    base = node("CheckpointLoaderSimple", ckpt_name=checkpoint)
    model, clip = [base, 0], [base, 1]
    if always is not None:
        both = node("LoraLoader", model=model, clip=clip, lora_name=always, strength_model=0.0, strength_clip=1.0)
        model, clip = [both, 0], [both, 1]
    if patch is not None:
        model = [node(patch[0], model=model, **patch[1]), 0]
    hooks = None
    for name, schedule in schedules.items():
        lora, previous = node("CreateHookLoraModelOnly", lora_name=name, strength_model=1.0), {}
        for start, strength in keyframes(schedule, shift):
            frame = node("CreateHookKeyframe", strength_mult=strength, start_percent=start, **previous)
            previous = {"prev_hook_kf": [frame, 0]}
        own = [node("SetHookKeyframes", hooks=[lora, 0], hook_kf=previous["prev_hook_kf"]), 0]
        hooks = own if hooks is None else [node("CombineHooks2", hooks_A=hooks, hooks_B=own), 0]
    clip = [node("SetClipHooks", clip=clip, hooks=hooks, apply_to_conds=True, schedule_clip=False), 0]
    sampled = node(
        "KSampler",
        model=model,
        positive=[node("CLIPTextEncode", clip=clip, text="a photo of sks dog"), 0],
        negative=[node("CLIPTextEncode", clip=clip, text=""), 0],
        latent_image=[node("EmptyLatentImage", width=1024, height=1024, batch_size=1), 0],
        **{"seed": 0, "steps": 30, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0},
    )
    decoded = node("VAEDecode", samples=[sampled, 0], vae=[base, 2])
    node("SaveImage", images=[decoded, 0], filename_prefix="nara")
    return nodes
