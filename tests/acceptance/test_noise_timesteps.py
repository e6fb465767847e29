"""λ read from a forward's own timestep: of a denoiser of Diffusers, or as a user declares it; a context beats it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nara_diffusion import TimestepNoise, noise_level, register_denoiser, set_noise_source
from tests.helpers.small_pipelines import small_unet

from ._noise_models import LAYERS, UNET_TARGETS, Stock, TwoLayers, adapt, assert_near, run

TEXT = 20
TIMESTEPS = [950.0, 120.0, 431.0]
X = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def stock() -> Stock:
    return adapt(small_unet(TEXT), UNET_TARGETS, scale=0.3)[1].double()


@pytest.fixture
def unet(stock: Stock) -> Any:
    return stock.adapted


@pytest.fixture(scope="module")
def inputs() -> tuple[Tensor, Tensor]:
    """Latents and text of three samples."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 5, TEXT, generator=generator)


def by_hand(stock: Stock, timesteps: Any, inputs: tuple[Tensor, Tensor], levels: Any = None) -> Tensor:
    """The stock UNet, one sample at a time, at weights of λ = t / 1000 unless told otherwise."""
    latents, text = (tensor.double() for tensor in inputs)
    timesteps = torch.as_tensor(timesteps, dtype=torch.float64).reshape(-1).expand(len(latents))
    return stock.each(timesteps / 1000 if levels is None else levels, latents, timesteps, text)


# ---------------------------------------------------------------------- a UNet of Diffusers


def test_unet_timestep_of_any_form_tells_each_sample_its_level_unless_a_context_does(
    unet: Any, stock: Stock, inputs: tuple[Tensor, Tensor]
) -> None:
    latents, text = inputs
    each, stated = torch.tensor(TIMESTEPS), torch.tensor([0.3, 0.9, 0.0])
    for forms in ((torch.tensor(431), 431, 431.0, torch.tensor([431])), (each, each.long())):
        expected, in_context = (by_hand(stock, forms[0], inputs, levels) for levels in (None, stated))
        for timestep in forms:
            assert_near(run(unet, latents, timestep, text), expected, unet)
        assert_near(run(unet, latents, encoder_hidden_states=text, timestep=forms[0]), expected, unet)
        with noise_level(unet, stated):
            assert_near(run(unet, latents, forms[0], text), in_context, unet)
    with pytest.raises(ValueError, match=r"1200.*TimestepNoise"):
        run(unet, latents, 1200, text)


@pytest.mark.parametrize(
    ("meaning", "level"), [("edm", 1 / (1 + math.exp(-1.6))), ("discrete", 0.0004)], ids=["edm", "discrete"]
)
def test_unet_fractional_timestep_that_may_be_log_sigma_raises_until_it_is_declared(
    inputs: tuple[Tensor, Tensor], meaning: str, level: float
) -> None:
    unet, stock = adapt(small_unet(TEXT), ["to_q", "conv1"])
    stock.double()
    latents, text = inputs
    with pytest.raises(ValueError, match=r"set_noise_source\(model, TimestepNoise\(\"edm\"\)\)"):
        run(unet, latents, 0.4, text)
    set_noise_source(unet, TimestepNoise(meaning))
    assert_near(run(unet, latents, 0.4, text), by_hand(stock, 0.4, inputs, level), unet)


# ---------------------------------------------------------------------- what a user declares


@pytest.fixture
def two() -> tuple[Any, Stock]:
    model, stock = adapt(TwoLayers(), LAYERS)
    return model, stock.double()


def test_timestep_noise_of_another_schedule_argument_and_scale(two: tuple[Any, Stock]) -> None:
    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = TwoLayers()

        def forward(self, x: Tensor, *, when: Tensor) -> Tensor:
            return self.inner(x)

    model, stock = adapt(Renamed(), LAYERS)
    set_noise_source(model, TimestepNoise("discrete", argument="when", num_train_timesteps=400, scale=0.5))
    with pytest.raises(ValueError, match=r"when is .*N = 400"):
        run(model, X, when=torch.tensor(201.0))  # 402 of 400
    timesteps = torch.tensor([199.0, 3.0, 88.0])
    rows = [run(stock.at(float(t) / 200), x[None], when=t) for t, x in zip(timesteps, X, strict=True)]
    assert_near(run(model, X, when=timesteps), torch.cat(rows), model)


def test_timestep_of_a_forward_is_not_left_for_a_part_called_alone(two: tuple[Any, Stock]) -> None:
    model, _ = two
    set_noise_source(model, TimestepNoise("sigma"))
    run(model, X, 0.3)
    for _ in range(2):
        with pytest.raises((RuntimeError, ValueError), match=r"noise_level\(model"):
            run(model.base_model.model.first, X)
        model.base_model.model.second.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(model, X, 0.3)


class AcceptanceFrames(TwoLayers):
    """Its layers see (b · frames, d), its timestep is (b,)."""

    def forward(self, x: Tensor, timestep: Any = None) -> Tensor:
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])


@pytest.mark.usefixtures("_registry")
@pytest.mark.parametrize("sample_major", [True, False])
def test_rows_of_frames_repeat_the_level_only_where_that_is_declared(sample_major: bool) -> None:
    kind = type(f"AcceptanceFrames{sample_major}", (AcceptanceFrames,), {})
    register_denoiser(kind.__name__, "sigma", sample_major=sample_major)
    model, stock = adapt(kind(), LAYERS)
    stock.double()
    x, levels = torch.randn(2, 3, 7), torch.tensor([0.9, 0.2])
    if sample_major:
        assert_near(run(model, x, levels), stock.each(levels, x.double()), model)
        with noise_level(model, levels.flip(0)):
            assert_near(run(model, x, levels), stock.each(levels.flip(0), x.double()), model)
    else:
        with pytest.raises(ValueError, match=r"2 values.*batch.*6"):
            run(model, x, levels)


class Progress(TimestepNoise):
    """A definition of λ of a user's own: 1 − progress², told as `timestep`."""

    def __init__(self) -> None:
        super().__init__("ratio")
        self.convention = "progress"

    def __call__(self, module: Any, args: Any, kwargs: Any) -> Any:
        return super().__call__(module, (args[0], 1 - args[1] ** 2), kwargs)


def test_custom_source_tells_the_level_until_it_is_removed(two: tuple[Any, Stock]) -> None:
    model, stock = two
    set_noise_source(model, Progress())
    progress = torch.tensor([0.1, 0.7, 0.95])
    assert_near(run(model, X, progress), stock.each(1 - progress.double() ** 2, X.double()), model)
    with noise_level(model, 0.4):
        assert_near(run(model, X, progress), stock.each(0.4, X.double()), model)
    set_noise_source(model, None)
    with pytest.raises(ValueError, match=r"set_noise_source\(model"):
        run(model, X, progress)
