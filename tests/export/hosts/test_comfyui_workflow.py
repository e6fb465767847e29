"""The workflow of several LoRAs for ComfyUI, against λ as ComfyUI computes it."""

import math

import pytest

from nara_diffusion import StrengthSchedule
from nara_diffusion.export.hosts.comfyui_workflow import comfyui_workflow, keyframes, level_of, percent_of

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
    nodes = comfyui_workflow(given, "base.safetensors")
    assert read_workflow(nodes) == {name: keyframes(schedule) for name, schedule in given.items()}
    links = [v for node in nodes.values() for v in node["inputs"].values() if isinstance(v, list)]
    assert all(link[0] in nodes for link in links)


def test_workflow_loads_text_encoders_always_on():
    nodes = comfyui_workflow({"a.safetensors": HAT}, "base.safetensors", always="a-text.safetensors")
    (lora,) = (node for node in nodes.values() if node["class_type"] == "LoraLoader")
    assert lora["inputs"]["lora_name"] == "a-text.safetensors"
    assert (lora["inputs"]["strength_model"], lora["inputs"]["strength_clip"]) == (0.0, 1.0)
