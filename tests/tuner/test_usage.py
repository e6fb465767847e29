"""The warnings of adapters that are used otherwise than they were trained or merged, and definitions of λ."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from peft import get_peft_model

from nara_diffusion import TimestepNoise, noise_level, set_noise_source
from nara_diffusion.loaders.other_trainers import PipelineComponents
from nara_diffusion.noise.context import find_holders
from nara_diffusion.tuner.usage import FewStepSampling, Usage
from tests.helpers.adapted import TwoLayers, adapted, nara_config

LINE = "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)"


class Sampler:
    """A pipeline in the middle of a call."""

    def __init__(self) -> None:
        self.scheduler: Any = None
        self._guidance_scale = 1.0

    def takes(self, steps: int, guidance: float, scheduler: Any) -> None:
        self.scheduler, self._guidance_scale = scheduler, guidance
        scheduler.set_timesteps(steps)


def few_step_config() -> Any:
    config = nara_config()
    config.few_steps = {"num_inference_steps": 2, "timestep_spacing": "trailing", "scheduler": LINE}
    return config


def messages(usage: Usage) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        usage.warn_of_sampling(["fast"])
    return [str(warning.message) for warning in caught]


def test_each_wrong_sampler_setting_warns_once() -> None:
    usage, pipe = Usage({"fast": few_step_config()}), Sampler()
    usage.pipelines.add(pipe)  # pyright: ignore[reportArgumentType]
    trailing, leading = DDIMScheduler(timestep_spacing="trailing"), EulerDiscreteScheduler()
    pipe.takes(2, 1.0, trailing)
    assert messages(usage) == []
    pipe.takes(3, 1.0, trailing)
    (text,) = messages(usage)
    assert text.endswith(
        f"the pipeline uses 3 steps. Instead, run: {LINE}; pipe(…, num_inference_steps=2, guidance_scale=1)"
    )
    pipe.takes(5, 1.0, trailing)
    assert messages(usage) == []
    pipe.takes(2, 1.0, leading)
    (text,) = messages(usage)
    assert "the pipeline uses EulerDiscreteScheduler with other timesteps. " in text
    pipe.takes(2, 4.0, leading)
    (text,) = messages(usage)
    assert "the pipeline uses guidance_scale 4, EulerDiscreteScheduler with other timesteps. " in text
    assert messages(usage) == []
    usage.configs["fast"] = few_step_config()  # another adapter with this name
    assert len(messages(usage)) == 1


def test_sampling_is_read_from_present_fields() -> None:
    config = few_step_config()
    config.few_steps |= {"of_a_later_version": 1}
    sampling = FewStepSampling.of(config)
    assert sampling == FewStepSampling(2, timestep_spacing="trailing", scheduler=LINE)
    assert FewStepSampling.of(nara_config()) is None


def test_pipeline_without_scheduler_is_not_warned_of() -> None:
    """As the models of another trainer (`checkpoint_nara_weights`)."""
    usage, models = Usage({"fast": few_step_config()}), PipelineComponents()
    usage.pipelines.add(models)  # pyright: ignore[reportArgumentType]
    assert messages(usage) == []


@pytest.mark.parametrize("is_merged", [False, True])
def test_forward_warns_of_other_sampler(is_merged: bool) -> None:
    model, pipe = adapted(TwoLayers(), target_modules=["first"], few_steps={"num_inference_steps": 2}), Sampler()
    pipe.takes(3, 1.0, DDIMScheduler())
    (holder,) = find_holders(model)
    holder.finder.usage.pipelines.add(pipe)  # pyright: ignore[reportArgumentType]
    with noise_level(model, 0.3):
        if is_merged:
            model.merge_adapter()
        with pytest.warns(UserWarning, match="trained to sample in 2 steps, but the pipeline uses 3 steps"):
            model(torch.randn(3, 7))


def test_merge_that_forwards_do_not_use_warns_not() -> None:
    base, x = TwoLayers(), torch.randn(3, 7)
    expected = base(x)
    model = adapted(base, target_modules=["first"])
    set_noise_source(model, lambda *_: torch.tensor([0.7]))
    model.base_model.merge_adapter(noise_level=0.3)
    with noise_level(model, 0.3):  # not the source's λ
        model(x)
    with model.disable_adapter():  # PEFT unmerges
        torch.testing.assert_close(model(x), expected)


def test_definition_is_adopted_by_all_adapters_or_none() -> None:
    model = get_peft_model(TwoLayers(), nara_config(target_modules=["first"]))
    model.add_adapter("fixed", nara_config(target_modules=["second"], noise_convention="flow"))
    (holder,) = find_holders(model)
    config, adopt = holder.finder.configs["default"], holder.finder.adopt_convention
    assert adopt(["default", "fixed"], "edm") == {"fixed": "flow"}
    assert config.noise_convention is None
    assert adopt(["default"], "edm") == {}
    assert adopt(["default"], "flow") == {"default": "edm"}
    config.assumes_convention = True
    assert adopt(["default", "fixed"], "flow") == {}
    assert config.noise_convention == "flow"
    assert not config.assumes_convention


def test_user_source_is_called_when_samples_lack_frames() -> None:
    """A subclass may count its calls."""
    model = get_peft_model(TwoLayers(), nara_config(target_modules=["first"]))
    source = TimestepNoise("sigma")
    set_noise_source(model, source)
    (holder,) = find_holders(model)
    assert holder.finder.present_source() is source
