"""λ of what pipelines pass to their denoisers, by the lines of their sources, at each step of their scheduler."""

from __future__ import annotations

import ast
import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nara_diffusion.noise.denoiser_classes import DENOISERS, SETTLED_BY_CONFIG
from nara_diffusion.noise.denoisers.denoiser import Denoiser
from tests.helpers.denoisers.passed.timesteps import Passed
from tests.helpers.denoisers.passed.to_images import IMAGES
from tests.helpers.denoisers.passed.to_videos import VIDEOS
from tests.helpers.diffusers_sources import ROOT

CASES = [(name, case) for name, cases in {**IMAGES, **VIDEOS}.items() for case in cases]
OWN_CONFIG = SimpleNamespace(timestep_scale_multiplier=1000)


@functools.cache
def statements_and_arguments(path: str) -> tuple[frozenset[str], frozenset[str]]:
    """The assignments in a source, and the arguments of its calls, without their line breaks."""
    folder, name = ("modular_pipelines", path[8:]) if path.startswith("modular ") else ("pipelines", path)
    tree = ast.parse((ROOT / folder / f"{name}.py").read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    arguments = [ast.unparse(argument) for call in calls for argument in call.args]
    arguments += [f"{keyword.arg}={ast.unparse(keyword.value)}" for call in calls for keyword in call.keywords]
    assigned = [ast.unparse(node) for node in nodes if isinstance(node, ast.Assign)]
    return frozenset(assigned), frozenset(arguments)


@pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{name}-{case.path}" for name, case in CASES])
def test_the_lines_are_those_of_the_installed_diffusers(name: str, case: Passed):
    assigned, arguments = statements_and_arguments(case.path)
    assert [line for line in case.lines if ast.unparse(ast.parse(line)) not in assigned] == []
    key, _, value = case.argument.rpartition("=")
    assert (f"{key}=" if key else "") + ast.unparse(ast.parse(value)) in arguments


def test_the_formula_of_the_scheduler_that_is_not_installed():
    path = ROOT / "schedulers" / "scheduling_cosine_dpmsolver_multistep.py"
    assert "return sigma.atan() / math.pi * 2" in path.read_text(encoding="utf-8")


def scheduled(case: Passed) -> Any:
    scheduler = case.scheduler()
    if getattr(scheduler.config, "num_train_timesteps", None) == 1:  # its pipelines give it σ
        scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 7, 7).tolist())
    else:
        scheduler.set_timesteps(7)
    return scheduler


def argument_at(case: Passed, scheduler: Any, i: int) -> Any:
    """What the lines make of step i: two samples of three frames or tokens, of which the first is given."""
    latents, given = torch.zeros(2, 3, 4), torch.tensor([[1.0, 0, 0]] * 2)
    in_5d = ("SanaVideo", "sana_video", "sana_wm")
    mask = given.view(2, 1, 3, 1, 1) if any(part in case.path for part in in_5d) else given
    variables: dict[str, Any] = {
        **dict.fromkeys(("latents", "latent_model_input", "model_input", "prompt_embeds"), latents),
        **dict.fromkeys(("batch_size", "total_batch_size", "num_noisy_vision_tokens"), 2),
        **dict.fromkeys(("num_images_per_prompt", "num_videos_per_prompt"), 1),
        "conditioning_mask": mask[..., None] if "condition" in case.path else mask,
        "cond_mask_input": mask,
        "condition_video_timestep": 1.0,
        "device": "cpu",
        "dtype": torch.float32,
        "i": i,
        "num_condition_video_rows": 1,
        "num_train_timesteps": 1000,
        "self": SimpleNamespace(scheduler=scheduler, do_classifier_free_guidance=True),
        "seq_len": 3,
        "sequence_length": 3,
        "sigmas_t": getattr(scheduler, "sigmas", None),
        "t": scheduler.timesteps[i],
        "t_sched": scheduler.timesteps[i],
        "torch": torch,
        "transformer_config": OWN_CONFIG,
        "video_indices": torch.arange(3),
        "video_timestep": float(scheduler.timesteps[i]),
    }
    exec("\n".join(case.lines), variables)
    return eval(case.argument.rpartition("=")[2], variables)


def level_at(denoiser: Denoiser, scheduler: Any, i: int) -> float:
    """λ of step i by the scheduler's own σ, or, where its schedule is discrete, by its timestep."""
    if denoiser.meaning == "ratio":
        return float(scheduler.timesteps[i])
    if denoiser.meaning == "discrete":
        return float(scheduler.timesteps[i]) / 1000
    sigma = float(scheduler.sigmas[i])
    if denoiser.meaning in ("edm", "angle"):
        return sigma / (1 + sigma)
    return 1 - sigma if getattr(scheduler.config, "invert_sigmas", False) else sigma


def settled(name: str) -> Denoiser:
    settle = SETTLED_BY_CONFIG.get(name)
    return DENOISERS[name] if settle is None else settle(DENOISERS[name], OWN_CONFIG)


@pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{name}-{case.path}" for name, case in CASES])
def test_the_level_is_the_noise_of_the_step(name: str, case: Passed):
    scheduler, denoiser = scheduled(case), settled(name)
    source = denoiser.source()
    levels: list[Tensor] = []
    for i in range(len(scheduler.timesteps)):
        if denoiser.meaning == "ratio" and i == len(scheduler.timesteps) - 1:
            break  # Würstchen's loops leave out the last one, 0
        level = source.noise_level(argument_at(case, scheduler, i))
        expected = level_at(denoiser, scheduler, i)
        rounding = 1e-3 if "to(torch.int64)" in "".join(case.lines) or name.startswith("Glm") else 1e-5
        torch.testing.assert_close(level, torch.full_like(level, expected), rtol=0, atol=rounding + 1e-7)
        levels.append(level)
    assert levels[0].min() > 0.8 > 0.5 > levels[-1].max()  # from noise to data
