"""A NaRA that was trained in a window of noise levels is off outside of it; a LoRA has to be switched off by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor

from nara_diffusion import TimestepNoise, noise_level
from nara_diffusion.dllm import load_backbone
from nara_diffusion.dllm import train as dllm
from nara_diffusion.dllm.mask_draws import draw_noise_levels
from nara_diffusion.dreambooth import train as dreambooth
from nara_diffusion.dreambooth.draws import drawable_levels
from nara_diffusion.noise.level import NoiseWindow
from nara_diffusion.noise.strength_schedule import within
from tests.acceptance._commands import by_the_card
from tests.acceptance._runs import TEXT, image_arguments, image_flags, text_arguments
from tests.helpers.small_pipelines import small_sdxl

POINTS = [[0.3, 0.0], [0.3, 1.0], [0.8, 1.0], [0.8, 0.0]]
WINDOW = {"min_noise_level": 0.3, "max_noise_level": 0.8}
LINE = "StrengthSchedule([(0.3, 0.0), (0.3, 1.0), (0.8, 1.0), (0.8, 0.0)])"
IDS = torch.randint(2, 90, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[..., Any]:
    return lambda **changes: text_arguments(tmp_path, **changes)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return image_flags(tmp_path_factory.mktemp("images"), small_sdxl())


@pytest.mark.parametrize(("low", "high"), [(0.3, 0.8), (0.0, 0.7), (1 / 3, 1.0), (0.123456789, 0.999)])
def test_strength_is_1_in_window_and_0_outside(low: float, high: float, monkeypatch) -> None:
    """low ≤ λ < high in float32, and λ = 1 too where high is 1."""
    window = NoiseWindow(low, high)
    schedule = within(window)
    edges = [np.float32(edge) for edge in (low, high)]
    near = [np.nextafter(edge, np.float32(to)) for edge in edges for to in (0, 1)]
    levels = torch.tensor([0.0, 0.5, 1.0, *map(float, edges), *map(float, near)], dtype=torch.float32)
    expected = [float(edges[0] <= np.float32(x) and (np.float32(x) < edges[1] or high == 1.0)) for x in levels.tolist()]
    assert schedule(levels).tolist() == window.contains(levels).float().tolist() == expected
    timesteps = torch.arange(1000)
    shares = TimestepNoise().noise_level(timesteps)
    assert torch.equal(drawable_levels(shares, window), timesteps[schedule(shares) == 1])
    uniform = torch.tensor([0.0, 2**-53, 0.5, 1 - 2**-53], dtype=torch.float64)
    monkeypatch.setattr("nara_diffusion.dllm.mask_draws.stratified_uniform", lambda *args, **kwargs: uniform.numpy())
    assert schedule(torch.from_numpy(draw_noise_levels([0, 1, 2, 3], 0, window=window))).tolist() == [1.0] * 4
    assert within(NoiseWindow())(levels).tolist() == [1.0] * len(levels)


def test_window_without_a_noise_level_is_refused() -> None:
    for ends in [(0.6, 0.2), (0.5, 0.5), (300, 700), (-0.1, 0.5), (0.0, 1.5), (math.nan, 1.0), (0.0, math.nan)]:
        with pytest.raises(ValueError, match=rf"low is {ends[0]} and high {ends[1]}, expected 0 ≤ low < high ≤ 1"):
            NoiseWindow(*ends)


# ---------------------------------------------------------------------- text


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text()


def logits(model: Any, level: float) -> Tensor:
    with noise_level(model, level), torch.no_grad():
        return model(IDS).logits


def test_text_adapter_keeps_its_window_after_a_resume(arguments, tmp_path):
    folder, options = tmp_path / "run", WINDOW | {"max_train_steps": 2, "checkpointing_steps": 1}
    dllm.main(arguments(**options))
    uninterrupted = (folder / TEXT).read_bytes()
    (folder / TEXT).unlink()
    dllm.main(arguments(**options, resume_from_checkpoint=str(folder / "checkpoint-1")))
    assert (folder / TEXT).read_bytes() == uninterrupted
    assert json.loads((folder / "adapter_config.json").read_text())["strength"] == POINTS
    assert "noise levels: 0.3 ≤ λ < 0.8; the adapter is off outside, by the strength in its file" in card_of(folder)
    assert "In `generate` the adapter runs at λ" in card_of(folder)
    base, _ = load_backbone(arguments().pretrained_model_name_or_path)
    with torch.no_grad():
        expected = base(IDS).logits
    model = PeftModel.from_pretrained(base, folder)
    for level in (0.0, 0.29, 0.8, 1.0):
        torch.testing.assert_close(logits(model, level), expected)
    for level in (0.3, 0.79):
        assert not torch.allclose(logits(model, level), expected, atol=1e-3)


def test_other_methods_say_that_they_stay_on(arguments, tmp_path, capsys):
    dllm.main(arguments(**WINDOW, adapter="oft", adapter_options={"r": 0, "oft_block_size": 8}, max_train_steps=1))
    assert "oft stays on outside" in card_of(tmp_path / "run")
    assert "switch it off" not in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"can't scale .* leave out --min_noise_level and"):
        arguments(**WINDOW, adapter_options={"bias": "all"})


def without_update(model: Any) -> Any:
    """`model` with B = 0: the base, or with DoRA the base whose rows have the trained magnitudes."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    return model


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_text_lora_card_says_how_to_switch_off(arguments, tmp_path, capsys, adapter):
    dllm.main(arguments(**WINDOW, adapter=adapter, max_train_steps=2))
    line = f'set_strength(model, "default", {LINE})'
    printed = capsys.readouterr().out
    assert f"switch it off outside: {line}" in printed
    assert "Exact match didn't rise; samples.jsonl has what was generated." in printed  # two steps teach nothing
    assert ("DoRA's magnitudes, which apply at every λ" in card_of(tmp_path / "run")) == (adapter == "dora")
    assert line in card_of(tmp_path / "run").partition("prompt = ")[0]
    model = by_the_card(tmp_path / "run", until="prompt = ")["model"]
    outside, inside = logits(model, 0.29), logits(model, 0.3)
    expected = logits(without_update(model), 0.3)
    torch.testing.assert_close(outside, expected)
    assert not torch.allclose(inside, expected, atol=1e-3)


# ---------------------------------------------------------------------- images


def predicted(pipe: Any, timestep: int) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    sample, text = torch.randn(1, 4, 2, 2, generator=generator), torch.randn(1, 5, 40, generator=generator)
    condition = {"text_embeds": torch.randn(1, 24, generator=generator), "time_ids": torch.ones(1, 6)}
    with torch.no_grad():
        return pipe.unet(sample, timestep, text, added_cond_kwargs=condition).sample


@pytest.mark.parametrize(
    ("adapter", "train_text_encoder"),
    [("nara", True), ("lora", False), ("dora", True)],
)
@pytest.mark.slow
def test_image_adapter_is_off_outside_when_loaded(
    adapter: str, train_text_encoder: bool, images: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = image_arguments(images, tmp_path / "run", **WINDOW, adapter=adapter, train_text_encoder=train_text_encoder)
    if adapter != "nara":
        args.core_learning_rate = None
    dreambooth.main(args)
    output = capsys.readouterr().out
    assert ("switch it off" in output) == (adapter != "nara")
    if adapter != "nara":
        texts = ", 'text_encoder': 1.0, 'text_encoder_2': 1.0}"
        weights = f"{{'unet': {LINE}{texts}" if train_text_encoder else LINE
        line = f"pipe.set_adapters('subject', adapter_weights={weights})"
        assert line in card_of(tmp_path / "run")
        assert f"switch it off outside: {line}" in output
    pipe = by_the_card(tmp_path / "run", until="image = ")["pipe"]
    if adapter == "nara":
        assert pipe.unet.peft_config["default_0"].strength == POINTS
    outputs = {timestep: predicted(pipe, timestep) for timestep in (0, 299, 300, 799, 800, 999)}
    without_update(pipe.unet)
    for timestep, output in outputs.items():
        base = predicted(pipe, timestep)
        if 300 <= timestep < 800:
            assert not torch.allclose(output, base, atol=1e-4)
        else:
            torch.testing.assert_close(output, base)
