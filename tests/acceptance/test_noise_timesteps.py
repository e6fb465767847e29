"""λ read from a forward's own timestep: of a denoiser of Diffusers, or as a user declares it; a context beats it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import UNetMotionModel
from torch import Tensor, nn

from nara_diffusion import TimestepNoise, noise_level, register_denoiser, register_noise_source, set_noise_source
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
    each = torch.tensor(TIMESTEPS)
    for timestep in (torch.tensor(431), 431, 431.0, torch.tensor([431]), each, each.long()):
        expected = by_hand(stock, timestep, inputs)
        assert_near(run(unet, latents, timestep, text), expected, unet)
        assert_near(run(unet, latents, encoder_hidden_states=text, timestep=timestep), expected, unet)
        with noise_level(unet, torch.tensor([0.3, 0.9, 0.0])):
            assert_near(run(unet, latents, timestep, text), by_hand(stock, timestep, inputs, [0.3, 0.9, 0.0]), unet)
    with pytest.raises(ValueError, match=r"1200.*TimestepNoise"):
        run(unet, latents, 1200, text)


def test_unet_batch_doubled_by_guidance_has_the_level_of_each_row(
    unet: Any, stock: Stock, inputs: tuple[Tensor, Tensor]
) -> None:
    latents, text = inputs
    twice = torch.cat([latents, latents]), torch.cat([torch.zeros_like(text), text])
    timesteps = torch.tensor(TIMESTEPS * 2)
    expected = by_hand(stock, timesteps, twice)
    assert_near(run(unet, twice[0], timesteps, twice[1]), expected, unet)
    with noise_level(unet, torch.tensor(TIMESTEPS) / 1000), pytest.raises(ValueError, match=r"3 values.*batch.*6"):
        run(unet, twice[0], timesteps, twice[1])


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


def test_video_unet_repeats_each_level_for_the_frames_of_its_sample() -> None:
    model, stock = adapt(
        UNetMotionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            down_block_types=("DownBlockMotion", "CrossAttnDownBlockMotion"),
            up_block_types=("CrossAttnUpBlockMotion", "UpBlockMotion"),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=TEXT,
            motion_num_attention_heads=2,
            num_attention_heads=2,
            use_motion_mid_block=False,
        ),
        [name for name in UNET_TARGETS if name != "proj_in"],  # which is called by keyword, as LoRA layers cannot be
    )
    stock.double()
    frames, text = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 5, TEXT).repeat_interleave(3, dim=0)
    timesteps, levels = torch.tensor([900, 50]), (0.9, 0.05)
    expected = [
        run(stock.at(levels[i]), frames[i : i + 1].double(), timesteps[i], text[3 * i : 3 * i + 3].double())
        for i in range(2)
    ]
    assert_near(run(model, frames, timesteps, text), torch.cat(expected), model)


# ---------------------------------------------------------------------- what a user declares


ANGLES = [0.02, 0.6, 0.98]
MEANINGS: dict[str, tuple[str, Any, list[float]]] = {
    "discrete": ("discrete", [998.0, 2.0, 437.5], [0.998, 0.002, 0.4375]),
    "ratio": ("ratio", [0.998, 0.002, 0.4], [0.998, 0.002, 0.4]),
    "sigma_1000": ("sigma_1000", [998.0, 2.0, 437.5], [0.998, 0.002, 0.4375]),
    "sigma": ("sigma", [0.998, 0.002, 0.4], [0.998, 0.002, 0.4]),
    "data_1000": ("data_1000", [998.0, 2.0, 437.5], [0.002, 0.998, 0.5625]),
    "data": ("data", [0.998, 0.002, 0.4], [0.002, 0.998, 0.6]),
    "edm": ("edm", [-1.5, 1.1, 0.1], [1 / (1 + math.exp(-4 * t)) for t in (-1.5, 1.1, 0.1)]),
    "angle": ("angle", ANGLES, [1 / (1 + 1 / math.tan(t * math.pi / 2)) for t in ANGLES]),
    "the noisiest of frames": ("sigma_1000", [[0.0, 700.0], [20.0, 0.0], [0.0, 0.0]], [0.7, 0.02, 0.0]),
}
"""{what: (meaning, timesteps, λ)}."""


@pytest.fixture
def two() -> tuple[Any, Stock]:
    model, stock = adapt(TwoLayers(), LAYERS)
    return model, stock.double()


@pytest.mark.parametrize("what", MEANINGS)
def test_timestep_noise_meaning_gives_its_formula(two: tuple[Any, Stock], what: str) -> None:
    (model, stock), (meaning, timesteps, levels) = two, MEANINGS[what]
    set_noise_source(model, TimestepNoise(meaning))
    assert_near(run(model, X, torch.tensor(timesteps)), stock.each(levels, X.double()), model)


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
def test_registered_denoiser_reads_its_timestep(two: tuple[Any, Stock]) -> None:
    kind = type("AcceptanceReversedFlow", (TwoLayers,), {})
    register_denoiser("AcceptanceReversedFlow", "data")
    model, stock = adapt(kind(), LAYERS)
    stock.double()
    timesteps = torch.tensor([0.1, 0.75, 0.998])
    assert_near(run(model, X, timesteps), stock.each(1 - timesteps.double(), X.double()), model)
    with pytest.raises(ValueError, match=r"noise_level\(model"):  # nobody has declared that one
        run(two[0], X, timesteps)


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


class AcceptanceProgress(TimestepNoise):
    """A definition of λ of a user's own: 1 − progress², told as `timestep`."""

    def __init__(self) -> None:
        super().__init__("ratio")
        self.convention = "acceptance_progress"

    def __call__(self, module: Any, args: Any, kwargs: Any) -> Any:
        return super().__call__(module, (args[0], 1 - args[1] ** 2), kwargs)


@pytest.mark.parametrize("how", ["set", "registered"])
def test_custom_source_tells_the_level(how: str) -> None:
    source = AcceptanceProgress()
    if how == "registered":
        register_noise_source(source)
    changes = {"noise_convention": "acceptance_progress"} if how == "registered" else {}
    model, stock = adapt(TwoLayers(), LAYERS, **changes)
    stock.double()
    if how == "set":
        set_noise_source(model, source)
    progress = torch.tensor([0.1, 0.7, 0.95])
    assert_near(run(model, X, progress), stock.each(1 - progress.double() ** 2, X.double()), model)
    with noise_level(model, 0.4):
        assert_near(run(model, X, progress), stock.each(0.4, X.double()), model)
    set_noise_source(model, None)
    with pytest.raises(ValueError, match=r"set_noise_source\(model"):
        run(model, X, progress)
    with pytest.raises(ValueError, match="acceptance_progress"):  # that of the adapter
        set_noise_source(adapt(TwoLayers(), LAYERS, noise_convention="acceptance_progress")[0], TimestepNoise("sigma"))
