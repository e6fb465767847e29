"""λ = t / N with the N of the scheduler at hand: in the step, in the adapter that trains, and where it is loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler

from nara_diffusion import NaraConfig, TimestepNoise
from nara_diffusion.dreambooth.cache import LatentCache, PromptCache
from nara_diffusion.dreambooth.denoiser import AdaptedDenoiser
from nara_diffusion.dreambooth.loss import TrainingStep, windowed_schedule
from nara_diffusion.dreambooth.objectives import Objective, build_objective
from nara_diffusion.dreambooth.objectives.timesteps import draw_indices
from nara_diffusion.loaders.schedulers import scheduler_fields
from nara_diffusion.noise.window import EVERYTHING
from tests.dreambooth.test_loss import CONFIG, batch_of
from tests.helpers.denoisers.adapted import told
from tests.helpers.small_pipelines import pixels, small_sdxl

N = 400
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = {
    "timestep": EulerDiscreteScheduler(**BETAS, num_train_timesteps=N),
    "flow": DPMSolverMultistepScheduler(num_train_timesteps=N, prediction_type="flow_prediction", use_flow_sigmas=True),
}


@pytest.fixture(params=SCHEDULERS)
def convention(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def pipe(convention: str) -> Any:
    """A base whose own scheduler has N timesteps; of a flow the adapter carries it as well."""
    pipe = small_sdxl()
    pipe.scheduler = SCHEDULERS["timestep"]
    return pipe


def adapted(pipe: Any, convention: str) -> AdaptedDenoiser:
    flow = SCHEDULERS["flow"] if convention == "flow" else None
    carried = None if flow is None else scheduler_fields(flow)
    config = NaraConfig(**CONFIG | {"noise_convention": convention, "scheduler": carried})
    model = AdaptedDenoiser(pipe, config, scheduler=flow)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def expected_levels(objective: Objective, indices: torch.Tensor) -> torch.Tensor:
    return (indices + (objective.source.convention == "flow")) / N  # σ begins at 1 / N


def test_step_with_another_number_of_timesteps_trains_and_reports_the_schedules_noise_level(
    pipe: Any, convention: str, folder: Path
) -> None:
    model, batch = adapted(pipe, convention), batch_of(folder, prior=False)
    objective = build_objective(SCHEDULERS[convention])
    prompts = PromptCache(pipe)
    step = TrainingStep(model, objective, LatentCache(pipe.vae), prompts, torch.device("cpu"), seed=11)
    seen: list[Any] = []
    levels = told(model.unet, lambda: seen.append(step(batch)))
    expected = expected_levels(
        objective, draw_indices([sample.position for sample in batch["samples"]], levels=N, seed=11)
    )
    torch.testing.assert_close(seen[0].noise_level, expected)
    torch.testing.assert_close(torch.tensor(levels), expected)


def test_windowed_schedule_with_another_number_of_timesteps_reaches_one(convention: str) -> None:
    objective = build_objective(SCHEDULERS[convention])
    inside = windowed_schedule(objective, EVERYTHING).inside
    assert inside.tolist() == list(range(N))
    last = objective.corrupt(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), torch.tensor([N - 1])).timestep
    assert objective.source.noise_level(last).item() == pytest.approx(1.0 if convention == "flow" else 399 / 400)


def test_adapter_loaded_beside_a_scheduler_of_another_length_reads_the_noise_levels_that_it_was_trained_at(
    pipe: Any, convention: str, tmp_path: Path
) -> None:
    model = adapted(pipe, convention)
    pipe.save_nara_weights(tmp_path)
    other = small_sdxl()
    other.scheduler = EulerDiscreteScheduler.from_config(SCHEDULERS["timestep"].config)
    other.load_nara_weights(tmp_path, adapter_name="default")
    levels: list[float] = []
    core = other.unet.get_submodule("nara_core.cores.default.shared")
    handle = core.register_forward_pre_hook(lambda _, args: levels.extend(args[0].tolist()))
    pixels(other)
    handle.remove()
    timesteps = other.scheduler.timesteps.tolist()
    assert levels == pytest.approx([timestep / N for timestep in timesteps])
    assert max(timesteps) > N / 2
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([3, 250]))
    conditions = {
        "encoder_hidden_states": torch.randn(2, 5, 40),
        "added_cond_kwargs": {"text_embeds": torch.randn(2, 24), "time_ids": torch.ones(2, 6)},
    }
    with torch.no_grad():
        torch.testing.assert_close(
            other.unet(*inputs, **conditions).sample, model.unet(*inputs, **conditions).sample, rtol=1e-5, atol=1e-5
        )


def test_source_that_was_set_keeps_its_number_of_timesteps(pipe: Any, convention: str, tmp_path: Path) -> None:
    from nara_diffusion import set_noise_source

    model = adapted(pipe, convention)
    pipe.save_nara_weights(tmp_path)
    source = TimestepNoise("discrete" if convention == "timestep" else "sigma_1000", num_train_timesteps=500)
    set_noise_source(model.unet, source)
    pipe.load_nara_weights(tmp_path, adapter_name="second")
    assert model.unet.nara_core.conventions.source is source
