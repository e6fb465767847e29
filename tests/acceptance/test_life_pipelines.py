"""A NaRA's pipeline with another scheduler, beside a sibling of `from_pipe`, and compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionImg2ImgPipeline
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from nara_diffusion import noise_level
from tests.acceptance._lives import (
    Lives,
    add_nara,
    assert_near,
    frozen_sd,
    predict,
    save_nara,
)
from tests.helpers.small_pipelines import pixels, small_sd

SHALLOW = {
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "attention_head_dim": 4,
}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of a NaRA, "a", and of one whose core is I, "static"."""
    root = tmp_path_factory.mktemp("naras")
    save_nara(root / "a")
    save_nara(root / "static", seed=6, core_type="identity")
    return root


def levels_of_steps(pipe: Any, steps: int) -> list[float]:
    """λ of each step of a run, sought among the shares t / 1 … t / 2000 that give the UNet's output again."""
    calls: list[tuple[tuple, dict, Tensor]] = []
    hook = pipe.unet.register_forward_hook(
        lambda _, args, kwargs, output: calls.append((args, kwargs, output[0])), with_kwargs=True
    )
    pixels(pipe, num_inference_steps=steps)
    hook.remove()
    return [_level(pipe.unet, *call) for call in calls]


def _level(unet: Any, args: tuple, kwargs: dict, output: Tensor) -> float:
    timestep = float(args[1])
    errors = {}
    for length in (500, 1000, 2000):
        if timestep <= length:
            with noise_level(unet, timestep / length), torch.no_grad():
                errors[timestep / length] = float((unet(*args, **kwargs)[0] - output).abs().max())
    best, *others = sorted(errors, key=lambda level: errors[level])
    assert errors[best] < 1e-4 < 1e-2 < errors[others[0]], errors
    return best


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (DDIMScheduler(num_train_timesteps=500, timestep_spacing="trailing", **BETAS), [0.998, 0.664, 0.332]),
        (EulerDiscreteScheduler(timestep_spacing="trailing", **BETAS), [0.999, 0.666, 0.332]),
    ],
    ids=["of 500 steps", "Euler"],
)
def test_lambda_after_the_scheduler_is_swapped_is_the_share_of_the_new_one(
    root: Path, scheduler: Any, expected: list[float]
) -> None:
    pipe: Any = frozen_sd()
    pipe.load_nara_weights(root / "a")
    before = pixels(pipe)
    first = pipe.scheduler
    pipe.scheduler = scheduler
    assert levels_of_steps(pipe, 3) == pytest.approx(expected, abs=1.5e-3)
    pipe.scheduler = first
    assert torch.equal(pixels(pipe), before)


def test_a_sibling_by_from_pipe_shares_the_adapters_and_their_end(root: Path) -> None:
    pipe: Any = frozen_sd()
    image = torch.rand(1, 3, 16, 16)

    def edited(sibling: Any) -> Tensor:
        sibling.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(1)
        options = {"strength": 0.7, "num_inference_steps": 4, "output_type": "np", "generator": generator}
        return torch.from_numpy(sibling("a photo", image=image, **options).images)

    lives = Lives()
    base = edited(StableDiffusionImg2ImgPipeline.from_pipe(lives.nara))
    lives.load(root / "static", "toy").call(lambda pipe: pipe.set_adapters("toy", 0.8))
    pipe, lora = lives.nara, lives.loras[0]
    sibling, siblings_lora = (StableDiffusionImg2ImgPipeline.from_pipe(each) for each in (pipe, lora))
    found = edited(sibling)
    torch.testing.assert_close(found, edited(siblings_lora), rtol=0, atol=1e-4)
    assert (found - base).abs().max() > 0.01
    assert sibling.get_active_adapters() == ["toy"]
    sibling.set_adapters("toy", 0.2)
    siblings_lora.set_adapters("toy", 0.2)
    lives.check_pixels()
    sibling.unload_nara_weights()
    assert torch.equal(edited(sibling), base)
    assert torch.equal(predict(pipe), predict(frozen_sd()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
def test_hotswap_at_equal_rank_compiles_nothing_again(tmp_path: Path) -> None:
    outputs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        source: Any = add_nara(small_sd(**SHALLOW), seed=seed)
        source.save_nara_weights(tmp_path / str(seed))
        outputs.append(predict(source))
    pipe: Any = small_sd(**SHALLOW)
    pipe.load_nara_weights(tmp_path / "1", adapter_name="toy")
    torch._dynamo.reset()
    counter = CompileCounter()
    pipe.unet.compile(backend=counter)
    assert_near(predict(pipe), outputs[0], pipe.unet)
    predict(pipe, torch.tensor([1, 20, 300]))
    graphs = counter.frame_count
    assert graphs
    pipe.load_nara_weights(tmp_path / "2", adapter_name="toy", hotswap=True)
    assert_near(predict(pipe), outputs[1], pipe.unet)
    assert counter.frame_count == graphs
    torch._dynamo.reset()
