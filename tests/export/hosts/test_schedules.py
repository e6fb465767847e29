"""Strengths over λ as hosts take them, against λ as the hosts compute it."""

import math
import re
from itertools import pairwise

import pytest
import torch

from nara_diffusion import StrengthSchedule
from nara_diffusion.export.hosts import schedules
from nara_diffusion.export.hosts.schedules import by_step, keyframes, level_of, percent_of, step_levels

HAT = StrengthSchedule([(0.2, 0.0), (0.5, 1.0), (0.9, 0.25)])
STEP = StrengthSchedule([(0.5, 1.0), (0.5, 0.0)])


@pytest.mark.parametrize("percent", [0.01, 0.3, 0.77, 0.999])
def test_percent_of_a_discrete_schedule_is_comfyuis(percent):
    timestep = (1 - percent) * 999.0  # ModelSamplingDiscrete.percent_to_sigma takes σ of this timestep
    assert level_of(percent) == pytest.approx(timestep / 1000)
    assert percent_of(level_of(percent)) == pytest.approx(percent)


@pytest.mark.parametrize("percent", [0.01, 0.3, 0.77, 0.999])
def test_percent_of_flows_is_comfyuis(percent):
    t = 1 - percent
    assert level_of(percent, 3.0) == pytest.approx(3.0 * t / (1 + 2.0 * t))  # time_snr_shift of SD3
    mu = 1.15
    assert level_of(percent, math.exp(mu)) == pytest.approx(math.exp(mu) / (math.exp(mu) + (1 / t - 1)))  # FLUX
    assert percent_of(level_of(percent, 3.0), 3.0) == pytest.approx(percent)


@pytest.mark.parametrize("shift", [None, 1.0, 3.0])
def test_keyframes_that_hold_are_near_the_schedule_at_every_percent(shift):
    frames = keyframes(HAT, shift)
    assert frames[0][0] == 0.0
    steepest = 1.0 / 0.3  # per λ
    reach = max(abs(level_of(i / 50, shift) - level_of((i + 1) / 50, shift)) for i in range(50))
    for percent in [i / 997 for i in range(998)]:
        held = [strength for start, strength in frames if start <= percent + 1e-12][-1]
        wanted = HAT(min(level_of(percent, shift), 1.0)).item()
        assert abs(held - wanted) <= steepest * reach + 1e-4


def test_keyframes_of_one_strength_are_one():
    assert keyframes(StrengthSchedule([(0, 0.7)])) == [[0.0, 0.7]]
    assert len(keyframes(STEP)) == 2


def test_steps_go_from_noise_to_picture():
    assert step_levels(4) == pytest.approx([0.999, 0.74925, 0.4995, 0.24975])
    assert step_levels(2, 3.0) == pytest.approx([1.0, 0.75])
    assert by_step(HAT, [0.999, 0.5, 0.35, 0.1]) == [0.25, 1.0, 0.5, 0.0]


def read_workflow(nodes):
    """{file: [(start percent, strength)]} that reach the conditioning, by following the links."""
    found = {}

    def of_hooks(link):
        node = nodes[link[0]]
        if node["class_type"] == "CombineHooks2":
            of_hooks(node["inputs"]["hooks_A"])
            of_hooks(node["inputs"]["hooks_B"])
            return
        assert node["class_type"] == "SetHookKeyframes"
        lora = nodes[node["inputs"]["hooks"][0]]
        assert lora["class_type"] == "CreateHookLoraModelOnly"
        frames, link = [], node["inputs"]["hook_kf"]
        while link is not None:
            frame = nodes[link[0]]
            assert frame["class_type"] == "CreateHookKeyframe"
            frames.append([frame["inputs"]["start_percent"], frame["inputs"]["strength_mult"]])
            link = frame["inputs"].get("prev_hook_kf")
        found[lora["inputs"]["lora_name"]] = frames[::-1]

    (sampler,) = (node for node in nodes.values() if node["class_type"] == "KSampler")
    text = nodes[sampler["inputs"]["positive"][0]]
    clip = nodes[text["inputs"]["clip"][0]]
    assert clip["class_type"] == "SetClipHooks"
    assert clip["inputs"]["apply_to_conds"] is True
    assert nodes[sampler["inputs"]["negative"][0]]["inputs"]["clip"] == text["inputs"]["clip"]
    of_hooks(clip["inputs"]["hooks"])
    return found


@pytest.mark.parametrize("count", [1, 2, 5])
def test_workflow_plays_the_keyframes_of_each_lora(count):
    given = {f"toy-{k}.safetensors": StrengthSchedule([(0, k / 10), (0.5, 1.0)]) for k in range(count)}
    nodes = schedules.comfyui_workflow(given, "base.safetensors")
    assert read_workflow(nodes) == {name: keyframes(schedule) for name, schedule in given.items()}
    links = [v for node in nodes.values() for v in node["inputs"].values() if isinstance(v, list)]
    assert all(link[0] in nodes for link in links)


def test_workflow_loads_text_encoders_always_on():
    nodes = schedules.comfyui_workflow({"a.safetensors": HAT}, "base.safetensors", always="a-text.safetensors")
    (lora,) = (node for node in nodes.values() if node["class_type"] == "LoraLoader")
    assert lora["inputs"]["lora_name"] == "a-text.safetensors"
    assert (lora["inputs"]["strength_model"], lora["inputs"]["strength_clip"]) == (0.0, 1.0)


@pytest.mark.parametrize("shift", [None, 3.0])
def test_loractl_is_the_schedule_between_its_points(shift):
    (text,) = re.findall(r"<lora:toy:([^>]+)>", schedules.loractl({"toy": HAT}, shift))
    pairs = [tuple(map(float, pair.split("@"))) for pair in text.split(",")]
    positions = [position for _, position in pairs]
    assert positions == sorted(positions)
    assert all("." in pair.split("@")[1] for pair in text.split(","))
    for percent in [0.02, 0.2, 0.5, 0.71, 0.9]:
        ends = [(pairs[0][0], -1.0), *pairs, (pairs[-1][0], 2.0)]
        (a, start), (b, end) = next(pair for pair in pairwise(ends) if pair[0][1] <= percent <= pair[1][1])
        value = a if end == start else a + (b - a) * (percent - start) / (end - start)
        assert value == pytest.approx(HAT(level_of(percent, shift)).item(), abs=2e-2 if shift else 2e-3)


def played(text, percent):
    """What prompt-control makes of [before:after:percent] at a percent."""
    while text.startswith("["):
        before, rest = text[1:-1].split(":[", 1) if ":[" in text else (None, None)
        if before is None:
            head, _, at = text[1:-1].rpartition(":")
            cut = re.search(r">:(?=<|$)|^:", head)
            before, after = (head[: cut.start() + 1], head[cut.end() :]) if not head.startswith(":") else ("", head[1:])
        else:
            inner, _, at = rest.rpartition(":")
            after = f"[{inner}"
        text = before if percent < float(at) else after
    return {name: float(value) for name, value in re.findall(r"<lora:([^:]+):([^>]+)>", text)}


def test_prompt_control_plays_the_keyframes():
    given = {"a": HAT, "b": StrengthSchedule([(0.2, 1.0), (0.5, 0.25)])}
    text = schedules.prompt_control(given)
    frames = {name: keyframes(schedule) for name, schedule in given.items()}
    for percent in [0.0, 0.05, 0.31, 0.5, 0.77, 0.99]:
        wanted = {
            name: [strength for start, strength in own if start <= percent + 1e-9][-1] for name, own in frames.items()
        }
        assert played(text, percent) == {name: value for name, value in wanted.items() if value}


def test_wan2gp_has_a_list_of_steps_for_each_lora():
    levels = step_levels(5, 5.0)
    first, second = schedules.wan2gp([HAT, STEP], levels).split(" ")
    assert [float(value) for value in first.split(",")] == by_step(HAT, levels)
    torch.testing.assert_close(torch.tensor([float(v) for v in second.split(",")]), STEP(torch.tensor(levels)))
