"""ComfyUI's node reads λ from the sampling at work by its own timesteps, and refuses one whose σ tells no λ.

The samplings restate those of comfy/model_sampling.py and comfy_extras/nodes_model_advanced.py (ComfyUI a125cd84), with
the same public attributes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nara_diffusion import NaraConfig, StrengthSchedule
from tests.acceptance import _bases, _files
from tests.acceptance._comfyui import CONST, EPS, V_PREDICTION, Discrete, Flow, comfyui
from tests.acceptance.test_files_comfyui import sdxl

FILE = "mine.safetensors"


class Distilled(Discrete):
    """ModelSamplingDiscreteDistilled, that of LCM: 50 of the 1000 sigmas."""

    def __init__(self) -> None:
        super().__init__()
        self.sigmas = self.sigmas[19::20]

    def timestep(self, sigma: Tensor) -> Tensor:
        return 20 * super().timestep(sigma) + 19


class ContinuousEDM:
    """ModelSamplingContinuousEDM: no schedule; the thousand sigmas are for ComfyUI's schedulers alone."""

    def __init__(self) -> None:
        self.sigmas = torch.linspace(math.log(0.002), math.log(120), 1000).exp()

    def timestep(self, sigma: Tensor) -> Tensor:
        return 0.25 * sigma.log()


class DiscreteEDM(Discrete):
    """ModelSamplingDiscreteEDM: a schedule, but no timesteps of it."""

    def timestep(self, sigma: Tensor) -> Tensor:
        return 0.25 * sigma.log()


class StableCascade(Discrete):
    """StableCascadeSampling: 10 000 sigmas, and a timestep in [0, 1]."""

    num_timesteps = 10_000

    def timestep(self, sigma: Tensor) -> Tensor:
        return 1 - 2 / torch.pi * (1 / (sigma**2 + 1)).sqrt().asin()


@pytest.fixture
def comfy(tmp_path: Path) -> Iterator[SimpleNamespace]:
    with comfyui(tmp_path) as found:
        found.folder = tmp_path
        yield found


def saved(folder: Path, **changes: Any) -> Any:
    """A pipeline with a NaRA, which is saved in `folder`."""
    pipe = _bases.sdxl()
    options = {"r": 4, "lora_alpha": 3, "target_modules": ["to_q", "conv1", "time_emb_proj"], "core_hidden_dims": (6,)}
    pipe.unet.add_adapter(NaraConfig(**{**options, **changes}), "mine")
    for name, parameter in pipe.unet.named_parameters():
        if "lora_" in name or "core" in name:
            parameter.data.copy_(0.3 * _bases.drawn(name, *parameter.shape))
    pipe.save_nara_weights(folder, "mine", weight_name=FILE)
    return pipe


def sampled(patcher: Any, sigma: Tensor) -> Tensor:
    x, context, y = _bases.unet_inputs()
    return patcher.sample(x, sigma, context=context, y=y)


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {"core_type": "knots", "core_sharing": "layer", "rank_pattern": {"conv1": 3}, "use_rslora": True},
        {"core_type": "bins", "core_bins": 2, "strength": StrengthSchedule([(0, 1.0), (0.6, 0.2)])},
    ],
    ids=["knots", "bins"],
)
def test_lcm_has_the_noise_level_of_its_timestep_not_of_its_fifty_sigmas(changes, comfy) -> None:
    pipe = saved(comfy.folder, **changes)
    model = sdxl(None, Distilled, EPS)
    patched, _ = comfy.load(model, FILE, "sdxl", 1.0)
    found = sampled(patched, model.model.model_sampling.sigmas[[0, 0, 40]])
    x, context, y = _bases.unet_inputs()
    wanted = _bases.unet_output(pipe.unet, x, torch.tensor([19, 19, 819]), context, y)
    _files.assert_near(found, wanted, pipe.unet)


@pytest.mark.parametrize("schedule", [ContinuousEDM, DiscreteEDM, StableCascade])
def test_a_sampling_without_timesteps_is_refused(schedule: type, comfy) -> None:
    saved(comfy.folder)
    patched, _ = comfy.load(sdxl(None, schedule, V_PREDICTION), FILE, "sdxl", 1.0)
    with pytest.raises(ValueError, match=rf"{schedule.__name__}.*choose the node ModelSamplingDiscrete"):
        sampled(patched, torch.tensor([0.5, 1.0, 2.0]))


def test_an_adapter_of_edm_is_refused_in_a_flow(comfy) -> None:
    saved(comfy.folder, noise_convention="edm")
    patched, _ = comfy.load(sdxl(None, Flow, CONST), FILE, "sdxl", 1.0)
    with pytest.raises(ValueError, match=r"σ / \(1 \+ σ\).*Flow"):
        sampled(patched, torch.tensor([0.1, 0.5, 0.9]))


@pytest.mark.parametrize("what", ["compiled", "replaced"])
def test_a_model_that_changed_after_loading_is_refused(what: str, comfy) -> None:
    """Compiled code doesn't call new hooks, and would keep the λ of an earlier step."""
    saved(comfy.folder)
    model = sdxl()
    patched, _ = comfy.load(model, FILE, "sdxl", 1.0)
    if what == "compiled":
        model.model.diffusion_model.get_submodule("middle_block.1").compile(backend="eager")
    else:
        model.model.diffusion_model = nn.Sequential(model.model.diffusion_model)
    with pytest.raises(ValueError, match=r"is compiled|modules aren't in this model"):
        sampled(patched, model.model.model_sampling.sigmas[[200, 200, 200]])
