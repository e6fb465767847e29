"""An adapter trained with a definition of λ of one's own: served where its source is registered, refused elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from nara_diffusion import noise_level, register_noise_source, set_noise_source
from nara_diffusion.noise import sources as conventions
from nara_diffusion.noise.signals import NoiseSignals
from tests.helpers.adapted import OneLayer, disturb, nara_config, relative_error
from tests.helpers.rounding import rounding_of
from tests.helpers.small_pipelines import pixels, small_sd

NAME = "squared_share"
TARGETS = ["to_q", "to_k"]


class SquaredShare:
    """λ = (t / 1000)², whatever the denoiser's class says."""

    convention = NAME

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoiseSignals:
        timestep = torch.as_tensor(args[1] if len(args) > 1 else kwargs["timestep"])
        return NoiseSignals((timestep.float().reshape(-1) / 1000) ** 2)


@pytest.fixture(autouse=True)
def _nothing_is_registered(monkeypatch) -> None:
    monkeypatch.setattr(conventions, "_sources", {})


def predict(unet: Any, timestep: int) -> torch.Tensor:
    torch.manual_seed(2)
    inputs = torch.randn(2, 4, 8, 8), timestep, torch.randn(2, 5, unet.config.cross_attention_dim)
    with torch.no_grad():
        return unet(*inputs).sample


@pytest.fixture
def trained() -> Any:
    """A pipeline whose adapter was trained while the source was registered."""
    pipe = small_sd()
    register_noise_source(SquaredShare())
    inject_adapter_in_model(nara_config(target_modules=TARGETS, noise_convention=NAME), pipe.unet)
    disturb(pipe.unet)
    conventions._sources.clear()
    return pipe


def test_a_pipeline_loads_it_and_reads_its_level(trained, tmp_path):
    trained.save_nara_weights(tmp_path)
    pipe = small_sd()
    base = pixels(pipe)
    with pytest.raises(
        ValueError, match=r"'squared_share', but the source of λ tells 'timestep'.* register_noise_source"
    ):
        pipe.load_nara_weights(tmp_path)
    assert torch.equal(pixels(pipe), base)
    register_noise_source(SquaredShare())
    pipe.load_nara_weights(tmp_path)
    assert torch.equal(pixels(pipe), pixels(trained))
    told = predict(pipe.unet, 700)
    with noise_level(pipe.unet, 0.49):
        assert relative_error(told, predict(pipe.unet, 700)) < rounding_of(pipe.unet)
    with noise_level(pipe.unet, 0.7):
        assert relative_error(told, predict(pipe.unet, 700)) > 0.1


def test_peft_loads_it_alike(tmp_path):
    register_noise_source(SquaredShare())
    config = nara_config(target_modules=TARGETS, noise_convention=NAME)
    model = get_peft_model(small_sd().unet, config)  # type: ignore[arg-type]
    disturb(model)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(small_sd().unet, tmp_path)  # type: ignore[arg-type]
    assert loaded.peft_config["default"].noise_convention == NAME
    assert torch.equal(predict(loaded, 700), predict(model, 700))
    conventions._sources.clear()
    with pytest.raises(ValueError, match=r"trained with λ defined as 'squared_share'"):
        PeftModel.from_pretrained(small_sd().unet, tmp_path)  # type: ignore[arg-type]


def test_a_model_that_reads_its_timestep_keeps_doing_so(trained, tmp_path):
    """One source serves a model; the adapter that comes second has to speak its convention."""
    trained.save_nara_weights(tmp_path)
    register_noise_source(SquaredShare())
    pipe = small_sd()
    inject_adapter_in_model(nara_config(target_modules=TARGETS), pipe.unet, adapter_name="first")
    assert pipe.unet.peft_config["first"].noise_convention == "timestep"
    with pytest.raises(ValueError, match=r"'squared_share', but the source of λ tells 'timestep'"):
        pipe.load_nara_weights(tmp_path, adapter_name="second")


def test_a_model_of_no_known_class_is_told_too():
    class Halves:
        convention = "halves"

        def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> NoiseSignals:
            return NoiseSignals(torch.full((1,), 0.5))

    register_noise_source(Halves())
    model = get_peft_model(OneLayer(nn.Linear(6, 10)), nara_config(target_modules=["layer"], noise_convention="halves"))
    disturb(model)
    x = torch.randn(3, 6)
    told = model(x)
    with noise_level(model, 0.5):
        assert torch.equal(told, model(x))


def test_a_source_of_its_own_still_wins(trained):
    set_noise_source(trained.unet, None)
    with pytest.raises(ValueError, match="λ is not known"):
        predict(trained.unet, 700)


@pytest.mark.parametrize("convention", ["timestep", "flow", "edm", "masked_share"])
def test_this_package_s_definitions_are_not_redefined(convention):
    source = SquaredShare()
    source.convention = convention
    with pytest.raises(ValueError, match=f"λ as '{convention}' is defined by this package"):
        register_noise_source(source)


@pytest.mark.parametrize("source", [lambda module, args, kwargs: None, NAME, None])
def test_what_is_no_source_is_refused(source):
    with pytest.raises(ValueError, match="is no source of λ: expected a callable"):
        register_noise_source(source)


def test_two_sources_of_one_name_are_refused_and_one_may_come_twice():
    source = SquaredShare()
    register_noise_source(source)
    register_noise_source(source)
    with pytest.raises(ValueError, match="'squared_share' has a source already"):
        register_noise_source(SquaredShare())
