"""λ that a source reads from a forward's arguments: a timestep, or what a user declares; a context beats it."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from nara_diffusion import (
    StrengthSchedule,
    TimestepNoise,
    noise_level,
    register_denoiser,
    register_noise_source,
    set_noise_source,
)
from nara_diffusion.noise.sources import registered
from nara_diffusion.noise.timesteps import _MEANINGS
from tests.helpers.adapted import nara_config
from tests.helpers.small_pipelines import small_unet

from ._noise_models import LAYERS, UNET_TARGETS, Stock, TwoLayers, adapt, assert_near, distance, run

TEXT = 20
X = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------- a UNet of Diffusers


@pytest.fixture(scope="module")
def inputs() -> tuple[Tensor, Tensor]:
    """Latents and text of three samples."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 5, TEXT, generator=generator)


def by_hand(stock: Stock, timesteps: Any, inputs: tuple[Tensor, Tensor], levels: Any = None) -> Tensor:
    """The stock UNet, one sample at a time, at weights of λ = t / 1000 by default."""
    latents, text = (tensor.double() for tensor in inputs)
    timesteps = torch.as_tensor(timesteps, dtype=torch.float64).reshape(-1).expand(len(latents))
    return stock.double().each(timesteps / 1000 if levels is None else levels, latents, timesteps, text)


def test_unet_timestep_in_any_form_sets_each_level(
    inputs: tuple[Tensor, Tensor],
) -> None:
    (unet, stock), (latents, text) = adapt(small_unet(TEXT), UNET_TARGETS, scale=0.3), inputs
    timesteps, stated = torch.tensor([950.0, 120.0, 431.0]), torch.tensor([0.3, 0.9, 0.0])
    for forms in ((torch.tensor(431), 431, 431.0, torch.tensor([431])), (timesteps, timesteps.long())):
        expected, in_context = (by_hand(stock, forms[0], inputs, levels) for levels in (None, stated))
        for timestep in forms:
            assert_near(run(unet, latents, timestep, text), expected, unet)
        assert_near(run(unet, latents, encoder_hidden_states=text, timestep=forms[0]), expected, unet)
        with noise_level(unet, stated):
            assert_near(run(unet, latents, forms[0], text), in_context, unet)
    with pytest.raises(ValueError, match=r"1200.*TimestepNoise"):
        run(unet, latents, 1200, text)


def test_unet_fractional_timestep_raises_until_declared(
    inputs: tuple[Tensor, Tensor],
) -> None:
    latents, text = inputs
    for meaning, level in (("edm", 1 / (1 + math.exp(-1.6))), ("discrete", 0.0004)):
        unet, stock = adapt(small_unet(TEXT), ["to_q", "conv1"])
        with pytest.raises(ValueError, match=r"set_noise_source\(model, TimestepNoise\(\"edm\"\)\)"):
            run(unet, latents, 0.4, text)
        set_noise_source(unet, TimestepNoise(meaning))
        assert_near(run(unet, latents, 0.4, text), by_hand(stock, 0.4, inputs, level), unet)


# ---------------------------------------------------------------------- what a user declares


def test_timestep_noise_of_another_schedule_argument_and_scale() -> None:
    class Renamed(TwoLayers):
        def forward(self, x: Tensor, *, when: Tensor) -> Tensor:
            return super().forward(x)

    model, stock = adapt(Renamed(), LAYERS)
    set_noise_source(model, TimestepNoise("discrete", argument="when", num_train_timesteps=400, scale=0.5))
    with pytest.raises(ValueError, match="meaning is 'noise': choose one of 'discrete'"):
        TimestepNoise("noise")
    with pytest.raises(ValueError, match=r"when is .*N = 400"):
        run(model, X, when=torch.tensor(201.0))  # 402 of 400
    for outside in (-1.0, 201.0):  # λ is off by 0.005
        with pytest.raises(ValueError, match=r"when is .*gives a λ outside \[0, 1\]"):
            run(model, X, when=outside)
    timesteps = torch.tensor([199.0, 3.0, 88.0])
    rows = [run(stock.at(float(t) / 200), x[None], when=t) for t, x in zip(timesteps, X, strict=True)]
    assert_near(run(model, X, when=timesteps), torch.cat(rows), model)


def test_timestep_of_forward_is_not_left_for_parts() -> None:
    model, _ = adapt(TwoLayers(), LAYERS)
    set_noise_source(model, TimestepNoise("sigma"))
    run(model, X, 0.3)
    for _ in range(2):
        with pytest.raises((RuntimeError, ValueError), match=r"noise_level\(model"):
            run(model.base_model.model.first, X)
        model.base_model.model.second.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(model, X, 0.3)


@pytest.mark.usefixtures("_registry")
@pytest.mark.parametrize("use_dora", [False, True], ids=["NaRA", "NaRA-DoRA"])
@pytest.mark.parametrize("frames", [2, 3])  # as many as there are samples, and more
def test_declared_frame_rows_repeat_their_samples_level(frames: int, use_dora: bool) -> None:
    class AcceptanceFrames(TwoLayers):
        """Its layers see (b · frames, d), its timestep is (b,)."""

        def forward(self, x: Tensor, timestep: Any = None) -> Tensor:
            return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    register_denoiser("AcceptanceFrames", "sigma", sample_major=True)
    model, stock = adapt(AcceptanceFrames(), LAYERS, use_dora=use_dora)
    x, levels = torch.randn(2, frames, 7), torch.tensor([0.9, 0.2])
    assert_near(run(model, x, levels), stock.double().each(levels, x.double()), model)
    with noise_level(model, levels.flip(0)):
        assert_near(run(model, x, levels), stock.each(levels.flip(0), x.double()), model)


class Share:
    """λ is the share of positive inputs."""

    def __init__(self, convention: str | None = "positive_share") -> None:
        self.convention = convention

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return (args[0] > 0).float().mean(1)


def test_source_of_another_convention_is_refused_everywhere() -> None:
    three = nn.ModuleList(
        get_peft_model(TwoLayers(), nara_config(target_modules=LAYERS, noise_convention=convention))
        for convention in (None, "masked_share", None)
    )
    for source in (Share(), Share(None), lambda module, args, kwargs: args[0][:, 0]):
        with pytest.raises(ValueError, match=r"'default' was trained with λ defined as 'masked_share', but the source"):
            set_noise_source(three, source)  # type: ignore[arg-type]
    for model in three:  # none has one
        with pytest.raises(ValueError, match=r"set_noise_source\(model"):
            model(X)
    set_noise_source(three[0], Share())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'default' was trained with λ defined as 'positive_share'"):
        set_noise_source(three[0], Share("share_of_negatives"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'other' was trained with λ defined as 'masked_share'"):
        three[0].add_adapter("other", nara_config(target_modules=LAYERS, noise_convention="masked_share"))
    assert "other" not in three[0].base_model.model.first.lora_A


def test_registered_source_is_used_until_it_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(registered, "positive_share", raising=False)  # and again after the test
    source, named = Share(), SimpleNamespace(convention="mine")
    meanings = {TimestepNoise(meaning).convention for meaning in _MEANINGS}
    for _ in range(2):
        register_noise_source(source)  # type: ignore[arg-type]
    for other, message in [
        *((Share(name), "is already defined, by this package") for name in (*meanings, "masked_share")),
        (Share(), "'positive_share' is already defined, by "),
        *((other, "is not a source of λ: expected a callable") for other in (lambda *_: None, "λ", named)),
    ]:
        with pytest.raises(ValueError, match=message):
            register_noise_source(other)  # type: ignore[arg-type]
    model, stock = adapt(TwoLayers(), LAYERS, noise_convention="positive_share")
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(copy.deepcopy(stock.model), tmp_path)
    assert_near(run(loaded, X), stock.double().each((X > 0).float().mean(1), X.double()), model)
    with noise_level(loaded, 0.4):
        assert_near(run(loaded, X), stock.each(0.4, X.double()), model)
    set_noise_source(loaded, None)
    with pytest.raises(ValueError, match=r"set_noise_source\(model"):
        run(loaded, X)


# ---------------------------------------------------------------------- values


def test_level_gradient_matches_finite_differences() -> None:
    model, _ = adapt(TwoLayers(), LAYERS, fourier_scale=2.0)

    def loss(levels: Tensor) -> Tensor:
        with noise_level(model, list(levels)):
            return model(X).square().sum()

    leaf, step = torch.tensor([0.05, 0.5, 0.93], requires_grad=True), 1e-3
    loss(leaf).backward()
    with torch.no_grad():
        moved = [(loss(leaf + step * row) - loss(leaf - step * row)) / (2 * step) for row in torch.eye(3)]
    assert distance(leaf.grad, torch.stack(moved)) < 1e-2


def test_equal_timesteps_get_one_gradient_per_sample() -> None:
    model, _ = adapt(TwoLayers(), LAYERS, fourier_scale=2.0)
    set_noise_source(model, TimestepNoise("sigma"))

    def loss(timestep: Tensor) -> Tensor:
        return model(X, timestep).square().sum()

    leaf, step = torch.full((3,), 0.4, requires_grad=True), 1e-3
    loss(leaf).backward()
    with torch.no_grad():
        moved = [(loss(leaf + step * row) - loss(leaf - step * row)) / (2 * step) for row in torch.eye(3)]
    assert distance(leaf.grad, torch.stack(moved)) < 1e-2


def test_schedule_of_wrong_points_is_refused() -> None:
    for points, message in [
        ([], r"points is \[\]: pass at least one pair"),
        ("0:1", "points is '0:1': pass"),
        ({0: 1.0}, r"points is \{0: 1.0\}: pass"),
        ([0.3], "points holds 0.3: pass pairs"),
        ([(0.3, "1")], r"points holds \(0.3, '1'\): pass pairs .* of finite numbers"),
        ([(0.3, float("nan"))], "of finite numbers"),
        ([(0.3, 1e39)], "of finite numbers"),
        ([(0, 1.0), (700, 0.3)], r"points holds \(700, 0.3\), but λ lies in \[0, 1\].*Divide a timestep"),
        ([(0.5, 1.0), (0.2, 2.0)], "λ 0.2 after λ 0.5: pass the points by ascending λ"),
        ([(0.5, 1.0), (0.5, 2.0), (0.5, 3.0)], "three points at one λ"),
    ]:
        with pytest.raises(ValueError, match=message):
            StrengthSchedule(points)
