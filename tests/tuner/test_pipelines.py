"""N, the meaning of small timesteps and the prediction come from the present scheduler of the pipelines that loaded."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EDMEulerScheduler, EulerDiscreteScheduler

from nara_diffusion.loaders.schedulers import scheduler_fields
from tests.acceptance._lives import add_nara, assert_near, frozen_sd, predict, save_lora, save_nara
from tests.helpers.small_pipelines import pixels

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
V = EulerDiscreteScheduler(**BETAS, prediction_type="v_prediction")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("naras")
    save_nara(root / "plain")
    for name, scheduler, convention in (("flow", FLOW, "flow"), ("v", V, "timestep")):
        pipe = add_nara(frozen_sd(), noise_convention=convention, scheduler=scheduler_fields(scheduler))
        pipe.save_nara_weights(root / name)
    return root


def loaded(folder: Path, name: str = "toy") -> Any:
    pipe: Any = frozen_sd()
    pipe.load_nara_weights(folder, adapter_name=name)
    return pipe


def test_timesteps_count_by_the_last_scheduler_without_a_pipeline(root: Path) -> None:
    pipe, timesteps = loaded(root / "plain"), torch.tensor([100, 180, 50])
    at_1000 = predict(pipe, timesteps)
    pipe.scheduler = DDIMScheduler(**BETAS, num_train_timesteps=500)
    unet, expected = pipe.unet, predict(pipe, timesteps)
    assert not torch.allclose(expected, at_1000, atol=1e-3)
    del pipe
    gc.collect()
    alone: Any = frozen_sd()
    alone.unet = unet
    assert_near(predict(alone, timesteps), expected, unet)


def test_pipelines_with_different_lengths_are_refused(root: Path) -> None:
    pipe, other = loaded(root / "plain"), frozen_sd()
    other.unet = pipe.unet
    other.load_nara_weights(root / "plain", adapter_name="second")  # type: ignore[attr-defined]
    predict(pipe)
    other.scheduler = DDIMScheduler(**BETAS, num_train_timesteps=500)
    with pytest.raises(ValueError, match=r"N = 500 and N = 1000.*set_noise_source"):
        predict(pipe)
    del other
    gc.collect()
    predict(pipe)


def test_small_timesteps_are_discrete_if_the_scheduler_is(root: Path) -> None:
    pipe = loaded(root / "plain")
    predict(pipe, torch.tensor([0.4, 1.3, 2.1]))
    pipe.scheduler = EDMEulerScheduler()
    with pytest.raises(ValueError, match=r"EDMEulerScheduler passes ¼ ln σ"):
        predict(pipe, torch.tensor([0.4, 1.3, 2.1]))


def test_scheduler_follows_set_adapters(root: Path, tmp_path: Path) -> None:
    pipe = loaded(root / "flow", "flow")
    expected = pixels(pipe)
    pipe.load_lora_weights(save_lora(tmp_path), adapter_name="plain")
    with pytest.raises(ValueError, match=r"predicts epsilon, but .* takes it for flow_prediction"):
        pixels(pipe)
    pipe.set_adapters("plain")
    alone: Any = frozen_sd()
    alone.load_lora_weights(save_lora(tmp_path), adapter_name="plain")
    assert torch.equal(pixels(pipe), pixels(alone))
    pipe.set_adapters(["plain", "flow"])
    pipe.set_adapters("flow")
    assert torch.equal(pixels(pipe), expected)


@pytest.mark.parametrize("how", ["disable_lora", "unload_lora_weights"])
def test_base_with_the_adapters_scheduler_is_refused_with_a_remedy(root: Path, how: str) -> None:
    image, pipe = pixels(frozen_sd()), loaded(root / "flow")
    getattr(pipe, how)()
    with pytest.raises(ValueError, match=r"predicts epsilon.*unload_nara_weights\(\)"):
        pixels(pipe)
    pipe.unload_nara_weights()
    assert torch.equal(pixels(pipe), image)


def test_adapters_of_different_predictions_are_refused_together(root: Path) -> None:
    pipe = loaded(root / "v", "v")
    with pytest.raises(ValueError, match="was trained with λ defined as 'flow'"):
        pipe.load_nara_weights(root / "flow", adapter_name="flow")
    pipe.load_nara_weights(root / "plain", adapter_name="plain")
    pipe.set_adapters(["plain", "v"])
    predict(pipe)


def test_scheduler_that_is_left_to_the_user_is_named_and_its_mismatch_refused(root: Path, caplog: Any) -> None:
    pipe: Any = frozen_sd()
    pipe.load_nara_weights(root / "flow", adapter_name="toy", set_scheduler=False)
    assert "prediction_type='flow_prediction', use_flow_sigmas=True" in caplog.text
    with pytest.raises(ValueError, match=r"predicts flow_prediction, but .* takes it for epsilon"):
        predict(pipe)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(FLOW.config)
    predict(pipe)
