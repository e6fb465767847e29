"""A small timestep that may be ¼ ln σ is taken for a discrete schedule's only where the scheduler at work says so."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    UNet2DConditionModel,
)
from nara_diffusion.noise.schedulers.timestep_meaning import check_discrete, passes_log_sigma, schedulers_at_work
from torch import Tensor

from nara_diffusion import TimestepNoise, noise_level, set_noise_source
from tests.helpers.adapted import nara_config

LOG_SIGMA = r"timestep is \[?0\.73.* say what this pipeline means by it.*TimestepNoise\(\"edm\"\)"


def loop(scheduler: Any, timestep: Any) -> None:
    """Somebody's sampler."""
    assert scheduler is not None
    check_discrete(timestep, "timestep")


class Sampler:
    """Somebody's sampler that keeps its scheduler."""

    def __init__(self, scheduler: Any) -> None:
        self.noise_scheduler = scheduler

    def step(self, timestep: Any) -> None:
        check_discrete(timestep, "timestep")


def from_a_pipeline(scheduler: Any, timestep: Any) -> None:
    pipe = DDPMPipeline(unet=None, scheduler=scheduler)  # type: ignore[arg-type]
    del scheduler
    assert pipe.config
    check_discrete(timestep, "timestep")


def from_its_own_attribute(scheduler: Any, timestep: Any) -> None:
    sampler = Sampler(scheduler)
    del scheduler
    sampler.step(timestep)


CALLERS = [loop, from_a_pipeline, from_its_own_attribute]
CONTINUOUS = {"timestep_type": "continuous", "prediction_type": "v_prediction"}


@pytest.mark.parametrize("call", CALLERS)
@pytest.mark.parametrize("timestep", [0.73, torch.tensor(0.73), torch.tensor([0.73, 1.0]), torch.tensor([0.73]).half()])
def test_an_edm_scheduler_at_work_is_found_and_a_discrete_one_too(call, timestep):
    with pytest.raises(ValueError, match=r"EDMEulerScheduler passes ¼ ln σ"):
        call(EDMEulerScheduler(), timestep)
    call(EulerDiscreteScheduler(use_karras_sigmas=True), timestep)


@pytest.mark.parametrize("call", CALLERS)
@pytest.mark.parametrize("timestep", [1.0, torch.tensor([0.0, 1.0])])
def test_a_whole_number_is_an_edm_scheduler_s_too(call, timestep):
    with pytest.raises(ValueError, match="EDMDPMSolverMultistepScheduler passes"):
        call(EDMDPMSolverMultistepScheduler(), timestep)


@pytest.mark.parametrize("timestep", [0.73, torch.tensor([0.73, 0.2], dtype=torch.bfloat16)])
def test_without_a_scheduler_in_sight_it_has_to_be_declared(timestep):
    with pytest.raises(ValueError, match=r"none is to be seen: say what this pipeline means by it"):
        check_discrete(timestep, "timestep")


@pytest.mark.parametrize(
    "timestep", [0, 3, 1.0, 4.5, 999.0, torch.tensor([0, 1]), torch.tensor([0.2, 640.5]), torch.tensor(2.0)]
)
def test_what_can_only_be_discrete_needs_no_scheduler(timestep):
    check_discrete(timestep, "timestep")


def test_the_innermost_call_that_knows_any_counts():
    outer = EDMEulerScheduler()
    assert outer.config
    loop(DDIMScheduler(), 0.73)
    assert schedulers_at_work() == [outer]


def test_one_of_two_is_enough_to_ask():
    discrete, continuous = DDIMScheduler(), EDMEulerScheduler()
    assert len({discrete, continuous}) == 2
    with pytest.raises(ValueError, match="EDMEulerScheduler passes"):
        check_discrete(0.73, "timestep")


def test_who_passes_log_sigma():
    assert passes_log_sigma(EulerDiscreteScheduler(**CONTINUOUS))
    assert not passes_log_sigma(EulerDiscreteScheduler(timestep_type="continuous"))  # its timesteps are discrete
    assert not passes_log_sigma(DDIMScheduler(prediction_type="v_prediction"))


# ---------------------------------------------------------------------- in an adapted UNet


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=6,
        attention_head_dim=4,
    )
    unet.add_adapter(nara_config(target_modules=["to_q"]))
    seen: list[float] = []
    core = unet.get_submodule("nara_core.cores.default.shared")
    core.register_forward_pre_hook(lambda _, args: seen.extend(args[0].tolist()))
    return SimpleNamespace(unet=unet, seen=seen)


def predict(unet: Any, timestep: Any) -> Tensor:
    with torch.no_grad():
        return unet(torch.zeros(1, 4, 8, 8), timestep, torch.zeros(1, 2, 6)).sample


def test_no_step_runs_before_it_is_declared(model):
    with pytest.raises(ValueError, match=LOG_SIGMA):
        predict(model.unet, 0.73)
    assert not model.seen


@pytest.mark.parametrize(
    ("meaning", "expected"), [("discrete", 0.00073), ("edm", 1 / (1 + 2.718281828 ** (-4 * 0.73)))]
)
def test_a_declaration_settles_it(model, meaning, expected):
    set_noise_source(model.unet, TimestepNoise(meaning))
    predict(model.unet, 0.73)
    assert model.seen == pytest.approx([expected], abs=1e-6)


def test_a_noise_level_settles_it(model):
    with noise_level(model.unet, 0.5):
        predict(model.unet, 0.73)
    assert model.seen == [0.5]
