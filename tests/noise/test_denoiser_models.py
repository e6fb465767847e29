"""One pass over Diffusers' denoisers: each sample of a batch gets the λ of its own timestep, and no other."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora import Linear

from nara_diffusion import noise_level
from nara_diffusion.noise.denoisers import _DENOISERS
from tests.helpers.adapted import relative_error
from tests.helpers.denoisers import (
    DENOISERS,
    WARNINGS_OF_DIFFUSERS,
    adapted_denoiser,
    inputs_of,
    run,
    sample_of,
    told,
)
from tests.noise.test_denoisers import NAMES

pytestmark = [pytest.mark.slow, *WARNINGS_OF_DIFFUSERS]
ONE_LEVEL = {"ErnieImageTransformer2DModel", "MiniMaxH3Transformer3DModel"}
"""Their layers see the tokens of all samples, or one sample alone."""


def test_every_class_whose_layers_may_see_several_rows_a_sample_has_a_model() -> None:
    assert {name for name, entry in _DENOISERS.items() if entry.sample_major or entry.one_level} <= DENOISERS.keys()
    assert DENOISERS.keys() <= _DENOISERS.keys()


@pytest.mark.parametrize("name", [name for name in DENOISERS if name not in ONE_LEVEL])
def test_each_sample_of_a_batch_has_the_level_of_its_timestep(name: str) -> None:
    argument, (row, _) = _DENOISERS[name].argument, NAMES[name]
    unit = 1000 if name == "SanaWMLTX2RefinerTransformer3DModel" else 1  # by the configuration of its model
    timesteps, levels = unit * torch.tensor(list(row[1])[:3]).float(), list(row[1].values())[:3]
    model, inputs = adapted_denoiser(name), inputs_of(name, 3)
    assert told(model, lambda: run(model, inputs, timesteps, argument)) == pytest.approx(levels, abs=1e-6)
    together = run(model, inputs, timesteps, argument)
    alone = [run(model, sample_of(inputs, i, 3), timesteps[i : i + 1], argument) for i in range(3)]
    assert relative_error(together, torch.cat(alone)) < 2e-4
    with noise_level(model, 0.5):
        assert relative_error(run(model, inputs, timesteps, argument), together) > 1e-3


@pytest.mark.parametrize("name", sorted(ONE_LEVEL))
def test_layers_that_see_tokens_of_all_samples_have_one_level(name: str) -> None:
    argument, model, inputs = _DENOISERS[name].argument, adapted_denoiser(name), inputs_of(name)
    for timestep, level in list(NAMES[name][0][1].items())[:3]:
        timesteps = torch.tensor([float(timestep)] * (1 if name.startswith("MiniMax") else 2))
        assert told(model, lambda given=timesteps: run(model, inputs, given, argument)) == pytest.approx([level])
    with noise_level(model, torch.tensor([0.2, 0.7])), pytest.raises(ValueError, match="noise_level has 2 values, but"):
        run(model, inputs, timesteps, argument)


def test_where_layers_may_see_several_rows_a_sample_the_batch_has_one_level_each_and_a_part_one_for_all() -> None:
    name = "UNetSpatioTemporalConditionModel"
    model, inputs = adapted_denoiser(name), inputs_of(name, 4)
    layer = next(module for module in model.modules() if isinstance(module, Linear))
    x = torch.randn(4, layer.in_features)
    with noise_level(model, [0.2, 0.7]):
        with pytest.raises(ValueError, match="noise_level has 2 values, but the batch is 4"):
            run(model, inputs, torch.tensor(0.25), _DENOISERS[name].argument)
        with pytest.raises(RuntimeError, match="noise_level has 2 values, but a part of a model"):
            layer(x)
    with noise_level(model, 0.2):
        assert layer(x).shape == (4, layer.out_features)
