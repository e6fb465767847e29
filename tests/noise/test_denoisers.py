"""The table of Diffusers' denoisers: its classes, what their pipelines' timesteps mean, and which rows they have.

Those marked slow are one pass over tiny models: each sample of a batch gets the λ of its own timestep, and no other.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import SCMScheduler
from packaging.version import Version
from peft.tuners.lora import Linear
from torch import nn

from nara_diffusion import TimestepNoise, noise_level
from nara_diffusion.noise.denoisers import _DENOISERS, source_of_class
from tests.helpers.adapted import relative_error
from tests.helpers.denoisers import (
    BATCH,
    DENOISERS,
    WARNINGS_OF_DIFFUSERS,
    adapted_denoiser,
    inputs_of,
    levels_of_core,
    run,
)
from tests.helpers.diffusers_sources import classes, forward_of, lineage, reads_the_time

pytestmark = WARNINGS_OF_DIFFUSERS
PAGE = (Path(__file__).parents[2] / "docs" / "denoisers.md").read_text(encoding="utf-8")
LEVELS: dict[str, dict[float, float]] = {
    "t / N": {0.0: 0.0, 250.0: 0.25, 1000.0: 1.0},
    "t": {0.0: 0.0, 0.25: 0.25, 1.0: 1.0},
    "1 − t / N": {1000.0: 0.0, 750.0: 0.25, 0.0: 1.0},
    "1 − t": {1.0: 0.0, 0.75: 0.25, 0.0: 1.0},
    "EDM, t = 2/π atan σ": {0.0: 0.0, 2 / math.pi * math.atan(1 / 3): 0.25, 0.5: 0.5, 1.0: 1.0},
    "EDM, t = ¼ ln σ": {t: 1 / (1 + math.exp(-4 * t)) for t in (-3.4, math.log(1 / 3) / 4, 0.0, 3.4)},
}
"""λ as the page has it → {t: λ}, with both ends."""


def declared() -> dict[str, tuple[str, dict[float, float], list[str], str]]:
    """Class → (convention, {t: λ}, arguments, rows a sample), from the tables of docs/denoisers.md."""
    meanings = {}
    for section in PAGE.split("\n### λ = ")[1:]:
        formula, convention = re.match(r"(.*) \(convention `(\w+)`\)", section).groups()  # type: ignore[union-attr]
        formula, _, meaning = formula.partition(": ")
        for name, arguments, rows in re.findall(r"^\| `(\w+)` \| (.*?)\| (.*?) \|", section, re.MULTILINE):
            level_of = LEVELS[meaning if "EDM" in meaning else formula]
            meanings[name] = convention, level_of, re.findall(r"\w+", arguments) or ["timestep"], rows.strip()
    return meanings


@pytest.mark.slow
def test_diffusers_timed_classes_are_declared_or_known() -> None:
    """If this fails after an update of Diffusers: read what the new class's pipelines pass, and put it on the page."""
    on_page = set(re.findall(r"`(\w+)`", PAGE))
    adapted = {name for name in classes() if "PeftAdapterMixin" in lineage(name) and name != "PeftAdapterMixin"}
    read_time = {name for name in classes() if "ModelMixin" in lineage(name) and reads_the_time(name)}
    assert len(adapted) > 60
    assert sorted((adapted | read_time) - on_page) == []
    if Version(diffusers.__version__) >= Version("0.42"):  # 0.41 lacks seven of them
        assert sorted(_DENOISERS.keys() - classes().keys()) == []


def test_denoisers_read_arguments_that_their_forwards_have() -> None:
    for name in sorted(_DENOISERS.keys() & classes().keys()):
        denoiser = _DENOISERS[name]
        pinned = [] if denoiser.pinned is None else [denoiser.pinned[0]]
        assert {denoiser.argument, *denoiser.also, *pinned} <= set(forward_of(name)), name


def test_denoisers_have_the_pages_levels_and_rows() -> None:
    assert declared().keys() == _DENOISERS.keys()
    assert f"{len(_DENOISERS)} classes" in PAGE
    for name, (convention, level_of, arguments, rows) in declared().items():
        denoiser = _DENOISERS[name]
        assert (denoiser.convention, [denoiser.argument, *denoiser.also]) == (convention, arguments), name
        assert denoiser.sample_major == (rows == "several"), name
        assert (denoiser.one_level or denoiser.packed) == (rows == "one λ a batch"), name
        levels = [denoiser.noise_level(timestep).item() for timestep in level_of]
        assert levels == pytest.approx(list(level_of.values()), abs=1e-6), name


def test_discrete_denoiser_follows_the_adapters_convention() -> None:
    denoiser = _DENOISERS["UNet2DConditionModel"]
    read = [denoiser.read_as(convention) for convention in ("edm", "flow", "timestep", None)]
    assert [source.meaning for source in read] == ["edm", "sigma_1000", "discrete", "discrete"]


def model(name: str, **config: Any) -> nn.Module:
    """A model of a class of this name, or of one derived from it."""
    kind = type(name, (nn.Module,), {})
    derived = type("Derived", (kind,), {})()
    derived.config = SimpleNamespace(**config)
    return derived


def test_configuration_tells_apart_what_one_class_serves() -> None:
    sana = source_of_class(model("SanaTransformer2DModel", guidance_embeds=False, timestep_scale=0.001))
    assert sana.noise_level(torch.tensor([0.25, 1.0])).tolist() == pytest.approx([0.25, 1.0])
    with pytest.raises(ValueError, match="gives a λ outside"):
        sana.noise_level(250.0)
    sprint = source_of_class(model("SanaTransformer2DModel", guidance_embeds=True, timestep_scale=0.001))
    scheduler = SCMScheduler()
    scheduler.set_timesteps(2)
    sigma = torch.sin(scheduler.timesteps) / (torch.cos(scheduler.timesteps) + torch.sin(scheduler.timesteps))
    assert sigma[0] > 1  # by rounding: the scheduler starts a little beyond π / 2
    assert sprint.noise_level(sigma[:-1]).tolist() == pytest.approx(sigma[:-1].tolist(), abs=1e-5)
    first = source_of_class(model("CosmosTransformer3DModel", extra_pos_embed_type="learnable"))
    second = source_of_class(model("CosmosTransformer3DModel", extra_pos_embed_type=None))
    assert (first.meaning, second.meaning) == ("edm", "sigma")
    refiner = source_of_class(model("SanaWMLTX2RefinerTransformer3DModel", timestep_scale_multiplier=1000))
    assert refiner.noise_level(250.0).item() == 0.25
    assert source_of_class(model("ControlNetModel")) is None


class Omni(nn.Module):
    """It has the timesteps of a video, of its sound, and a mode in which it reads none."""

    def forward(self, x: Any, timestep: Any = None, sound: Any = None, mode: str = "") -> None: ...


def level_of(source: TimestepNoise, **given: Any) -> list[float]:
    return source(Omni(), (None,), given).tolist()


def test_noisiest_timestep_counts_and_pinned_one_wins() -> None:
    source = TimestepNoise("sigma", also=("sound",), pinned=("mode", "extract", 0.125))
    frames = torch.tensor([[0.0, 0.75], [0.25, 0.25]])
    assert level_of(source, timestep=frames) == [0.75, 0.25]
    assert level_of(source, timestep=frames, sound=torch.tensor([0.125, 0.5])) == [0.75, 0.5]
    assert level_of(source, timestep=torch.zeros(0), sound=0.5) == [0.5]  # a video that is given has no timesteps
    assert level_of(source, timestep=frames, mode="extract") == [0.125]
    with pytest.raises(ValueError, match="got no timestep and no sound"):
        level_of(source)
    assert level_of(TimestepNoise("data", packed=True), timestep=torch.tensor([0.25, 0.75, 1.0])) == [0.75]
    assert level_of(TimestepNoise("sigma"), timestep=torch.tensor([0.5, 0.25])) == [0.5, 0.25]


@pytest.mark.parametrize(
    ("timestep", "levels"),
    [
        (0.5, [0.5]),
        (torch.tensor(0.5), [0.5]),
        (torch.tensor([0.5]), [0.5]),
        (torch.tensor(0.5).expand(3), [0.5]),
        (torch.tensor([0.25, 0.5]).expand(3, 2), [0.5]),
        (torch.tensor([0.5, 0.5, 0.5]), [0.5, 0.5, 0.5]),  # values aren't compared
        (torch.tensor(0.5).expand(3).bfloat16(), [0.5, 0.5, 0.5]),  # a cast has no strides of 0
    ],
)
def test_timestep_is_shared_by_its_shape_or_strides(timestep: float | torch.Tensor, levels: list[float]) -> None:
    assert level_of(TimestepNoise("sigma"), timestep=timestep) == levels


def test_timestep_and_sound_timestep_are_shared_together() -> None:
    source, shared = TimestepNoise("sigma", also=("sound",)), torch.tensor(0.5).expand(2)
    assert level_of(source, timestep=shared, sound=torch.tensor([0.25, 0.75])) == [0.5, 0.75]
    assert level_of(source, timestep=shared, sound=torch.tensor(0.25).expand(2)) == [0.5]


# ---------------------------------------------------------------------- models


ONE_LEVEL = {"ErnieImageTransformer2DModel", "MiniMaxH3Transformer3DModel"}
"""Their layers see the tokens of all samples, or one sample alone."""


def test_every_class_with_several_rows_has_a_model() -> None:
    assert {name for name, entry in _DENOISERS.items() if entry.sample_major or entry.one_level} <= DENOISERS.keys()
    assert DENOISERS.keys() <= _DENOISERS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in DENOISERS if name not in ONE_LEVEL])
def test_each_sample_has_the_level_of_its_timestep(name: str) -> None:
    argument, expected = _DENOISERS[name].argument, declared()[name][1]
    unit = 1000 if name == "SanaWMLTX2RefinerTransformer3DModel" else 1  # by the configuration of its model
    timesteps, levels = unit * torch.tensor(list(expected)[:BATCH]).float(), list(expected.values())[:BATCH]
    model, inputs = adapted_denoiser(name), inputs_of(name)
    frames = 2 if name == "AnyFlowTransformer3DModel" else 0  # one λ a frame, then the samples' largest
    per_row = [level for level in levels for _ in range(frames)] + levels
    assert levels_of_core(model, lambda: run(model, inputs, timesteps, argument)) == pytest.approx(per_row, abs=1e-6)
    together = run(model, inputs, timesteps, argument)
    for i, row in enumerate(together):  # where all have one λ, no row can get that of another
        assert relative_error(row, run(model, inputs, timesteps[i].expand(BATCH), argument)[i]) < 2e-4
    with noise_level(model, 0.5):
        assert relative_error(run(model, inputs, timesteps, argument), together) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ONE_LEVEL))
def test_layers_seeing_all_samples_tokens_have_one_level(name: str) -> None:
    argument, model, inputs = _DENOISERS[name].argument, adapted_denoiser(name), inputs_of(name)
    for timestep, level in list(declared()[name][1].items())[:3]:
        timesteps = torch.tensor([float(timestep)] * (1 if name.startswith("MiniMax") else BATCH))
        levels = levels_of_core(model, lambda given=timesteps: run(model, inputs, given, argument))
        assert levels == pytest.approx([level])
    with noise_level(model, [0.2, 0.7]), pytest.raises(ValueError, match=r"2 values, but the layers of .* see"):
        run(model, inputs, timesteps, argument)


@pytest.mark.slow
def test_several_rows_per_sample_require_one_level() -> None:
    name = "UNetSpatioTemporalConditionModel"
    model, inputs = adapted_denoiser(name), inputs_of(name)
    layer = next(module for module in model.modules() if isinstance(module, Linear))
    x = torch.randn(4, layer.in_features)
    with noise_level(model, [0.2, 0.7]):
        with pytest.raises(ValueError, match="noise_level has 2 values, but the batch is 3"):
            run(model, inputs, torch.tensor(0.25), _DENOISERS[name].argument)
        with pytest.raises(RuntimeError, match="noise_level has 2 values, but a part of a model"):
            layer(x)
    with noise_level(model, 0.2):
        assert layer(x).shape == (4, layer.out_features)
