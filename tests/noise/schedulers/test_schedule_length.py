"""λ = t / N with the N of the schedule at work, whoever set a strength or added an adapter, and whenever."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from nara_diffusion import TimestepNoise, set_noise_source, set_strength
from nara_diffusion.loaders.schedulers import scheduler_fields
from tests.helpers.small_pipelines import pixels, small_sdxl
from tests.loaders.adapters import predict, save_lora, trained
from tests.strength.models import SCHEDULE

N = 400


def shorten(pipe: Any, length: int = N) -> Any:
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, num_train_timesteps=length)
    return pipe


def levels_of(model: Any, call: Callable[[], Any], name: str = "default") -> list[float]:
    """λ as the core of an adapter is told it at each forward that `call` runs."""
    levels: list[float] = []
    core = model.get_submodule(f"nara_core.cores.{name}.shared")
    handle = core.register_forward_pre_hook(lambda _, args: levels.extend(args[0].tolist()))
    call()
    handle.remove()
    return levels


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    save_lora(folder)
    return folder


@pytest.fixture(scope="module")
def expected(lora: Path) -> Tensor:
    """The image of a LoRA that is given, before each step, the number of that step's t / 400."""
    pipe = shorten(small_sdxl())
    pipe.load_lora_weights(lora, adapter_name="toy")
    pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: pipe.set_adapters("toy", SCHEDULE(float(args[1]) / N).item()), with_kwargs=True
    )
    return pixels(pipe)


def by_set_strength(pipe: Any, lora: Path) -> None:
    shorten(pipe).load_lora_weights(lora, adapter_name="toy")
    set_strength(pipe.unet, "toy", SCHEDULE)


def by_the_unet(pipe: Any, lora: Path) -> None:
    shorten(pipe).load_lora_weights(lora, adapter_name="toy")
    pipe.unet.set_adapters("toy", SCHEDULE)


def by_the_pipeline(pipe: Any, lora: Path) -> None:
    shorten(pipe).load_lora_weights(lora, adapter_name="toy")
    pipe.set_adapters("toy", SCHEDULE)


def before_the_scheduler(pipe: Any, lora: Path) -> None:
    pipe.load_lora_weights(lora, adapter_name="toy")
    pipe.set_adapters("toy", SCHEDULE)
    shorten(pipe)


@pytest.mark.parametrize("give", [by_set_strength, by_the_unet, by_the_pipeline, before_the_scheduler])
def test_strength_of_a_lora_is_that_of_its_step_whoever_set_it(give: Any, lora: Path, expected: Tensor) -> None:
    pipe = small_sdxl()
    give(pipe, lora)
    torch.testing.assert_close(pixels(pipe), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("length", [N, 2000])
def test_adapter_that_the_unet_was_given_reads_the_running_pipelines_schedule(length: int) -> None:
    pipe = shorten(trained(text=False), length)
    levels = levels_of(pipe.unet, lambda: pixels(pipe))
    assert levels == pytest.approx([float(t) / length for t in pipe.scheduler.timesteps])
    assert max(levels) > 0.9


class Sampler:
    """Somebody's sampler, of which a forward of the UNet is one step."""

    def __init__(self, pipe: Any, scheduler: Any) -> None:
        self.models = [pipe]
        self.noise_scheduler = scheduler

    def step(self) -> None:
        predict(self.models[0])


def with_its_pipeline(held: list[Any]) -> None:
    pipe = held[0]
    predict(pipe)


def with_its_scheduler(held: list[Any]) -> None:
    scheduler = held[0].scheduler
    forward(held)
    assert scheduler


def with_its_own_attribute(held: list[Any]) -> None:
    Sampler(held[0], held[0].scheduler).step()


def forward(held: list[Any]) -> None:
    """Two samples at t = 33 and 270, from a function that knows neither pipeline nor scheduler."""
    unet = held[0].unet
    torch.manual_seed(9)
    condition = {"text_embeds": torch.randn(2, 24), "time_ids": torch.ones(2, 6)}
    with torch.no_grad():
        unet(torch.randn(2, 4, 8, 8), torch.tensor([33, 270]), torch.randn(2, 5, 40), added_cond_kwargs=condition)


def test_forward_in_a_loop_of_ones_own_reads_the_scheduler_of_the_loop() -> None:
    held = [shorten(trained(text=False), 1500)]
    for loop in (with_its_pipeline, with_its_own_attribute):
        levels = levels_of(held[0].unet, lambda loop=loop: loop(held))
        assert levels == pytest.approx([33 / 1500, 870 / 1500])
    levels = levels_of(held[0].unet, lambda: with_its_scheduler(held))
    assert levels == pytest.approx([33 / 1500, 270 / 1500])


def test_forward_with_no_scheduler_in_sight_reads_that_of_the_load_or_1000(tmp_path: Path) -> None:
    held = [shorten(trained(text=False))]
    levels = levels_of(held[0].unet, lambda: forward(held))  # pytest keeps parts of an assert as variables
    assert levels == pytest.approx([0.033, 0.27])
    held[0].save_nara_weights(tmp_path)
    held[0] = shorten(small_sdxl())
    held[0].load_nara_weights(tmp_path, adapter_name="default")
    levels = levels_of(held[0].unet, lambda: forward(held))
    assert levels == pytest.approx([33 / N, 270 / N])


def test_schedulers_of_unlike_lengths_are_refused_unless_a_pipeline_has_told_which(tmp_path: Path) -> None:
    def beside_another(held: list[Any]) -> None:
        schedulers = small_sdxl().scheduler, held[0].scheduler
        first, second = schedulers
        forward(held)
        assert first.config.num_train_timesteps != second.config.num_train_timesteps

    held = [shorten(trained(text=False))]
    with pytest.raises(ValueError, match=r"N = 400 and N = 1000: say which, .*num_train_timesteps=N"):
        beside_another(held)
    levels = levels_of(held[0].unet, lambda: pixels(held[0]))  # a pipeline is the innermost call that has any
    assert max(levels) == pytest.approx(399 / N)
    held[0].save_nara_weights(tmp_path)
    held[0] = shorten(small_sdxl())
    held[0].load_nara_weights(tmp_path, adapter_name="default")
    levels = levels_of(held[0].unet, lambda: beside_another(held))
    assert levels == pytest.approx([33 / N, 270 / N])
    set_noise_source(held[0].unet, TimestepNoise(num_train_timesteps=500))
    for loop in (beside_another, with_its_scheduler):
        levels = levels_of(held[0].unet, lambda loop=loop: loop(held))
        assert levels == pytest.approx([33 / 500, 270 / 500])


def test_scheduler_that_an_adapters_own_has_replaced_is_not_at_work(tmp_path: Path) -> None:
    flow = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    trained(text=False, noise_convention="flow", scheduler=scheduler_fields(flow)).save_nara_weights(tmp_path)
    pipe = shorten(small_sdxl())
    pipe.load_nara_weights(tmp_path, adapter_name="default")
    assert pipe.scheduler.config.num_train_timesteps == 1000
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, num_train_timesteps=1600)
    levels = levels_of(pipe.unet, lambda: pixels(pipe))
    assert levels == pytest.approx([float(t) / 1600 for t in pipe.scheduler.timesteps])
    assert max(levels) > 0.9


def test_timestep_beyond_the_schedule_is_refused_with_its_length() -> None:
    pipe = shorten(trained(text=False))
    with pytest.raises(ValueError, match=r"\[33.0, 870.0\], which as 'discrete' is no λ in \[0, 1\] with N = 400\."):
        predict(pipe)
