"""The core "film" (Tc-LoRA) in layers, against s B (γ(λ) ⊙ A x + β(λ)) in float64."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import Timesteps
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nara_diffusion import StrengthSchedule, core_matrix, noise_level, set_strength, to_lora
from nara_diffusion.cores.other_cores import FilmCore
from tests.helpers.adapted import OneLayer, TwoLayers, adapted, nara_config, relative_error

LEVELS = torch.tensor([0.05, 0.333, 0.98])
X = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(2))
RANKS = {"first": 4, "second": 3}
DORA = pytest.mark.parametrize("use_dora", [False, True], ids=["film", "film-DoRA"])


def film(model: nn.Module | None = None, **changes: Any) -> Any:
    options = {"target_modules": ["first", "second"], "rank_pattern": {"second": 3}, **changes}
    return adapted(model or TwoLayers(), core_type="film", core_sharing="layer", **options)


def embedded(level: Tensor) -> Tensor:
    """The sinusoids (b, 256) of the timestep 1000 λ, float64."""
    frequencies = torch.tensor([10_000 ** (-i / 128) for i in range(128)], dtype=torch.float64)
    angle = 1000 * level.double()[:, None] * frequencies
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def short(key: str) -> str:
    """The name of a parameter in `layer_by_hand`."""
    key = key.replace("lora_A.default.weight", "A").replace("lora_B.default.weight", "B")
    return key.replace("lora_magnitude_vector.default.weight", "magnitude").replace("lora_core.cores.default.", "")


def layer_by_hand(tensors: dict[str, Tensor], name: str, x: Tensor, level: Tensor, strength: Tensor) -> Tensor:
    """y (b, l, d_out) for x (b, l, d_in), λ (b,) and its strengths (b,), all in float64."""
    W, b, A, B = (tensors[f"{name}.{key}"] for key in ("base_layer.weight", "base_layer.bias", "A", "B"))
    e, s = embedded(level), 6 / RANKS[name] * strength[:, None, None]
    gamma, beta = (e @ tensors[f"{name}.{key}.weight"].T + tensors[f"{name}.{key}.bias"] for key in ("gamma", "beta"))
    update = s * ((x @ A.T) * gamma[:, None] + beta[:, None]) @ B.T
    magnitude = tensors.get(f"{name}.magnitude")
    if magnitude is None:
        return x @ W.T + b + update
    norm = (W + s * B @ torch.diag_embed(gamma) @ A).detach().norm(dim=2)  # (b, d_out)
    return (magnitude / norm)[:, None] * (x @ W.T + update) + b


def by_hand(model: Any, x: Tensor, level: Tensor, strength: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and {short name: parameter, in float64, that has the gradient}."""
    tensors = {}
    for key, tensor in model.base_model.model.state_dict().items():
        tensors[short(key)] = tensor.double().clone().requires_grad_("base_layer" not in key)
    hidden = torch.tanh(layer_by_hand(tensors, "first", x.double(), level, strength))
    return layer_by_hand(tensors, "second", hidden, level, strength), tensors


def gradients(model: Any) -> dict[str, Tensor]:
    named = model.base_model.model.named_parameters()
    return {short(key): parameter.grad for key, parameter in named if parameter.grad is not None}


def test_film_core_embedding_is_that_of_diffusers_timesteps() -> None:
    core = FilmCore(256)
    nn.init.eye_(core.gamma.weight)
    nn.init.zeros_(core.gamma.bias)
    nn.init.eye_(core.beta.weight)
    D = core.at(LEVELS)
    assert D.shape == (3, 256, 257)
    expected = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)(1000 * LEVELS)
    assert relative_error(D[..., -1], expected) < 1e-4  # Diffusers rounds 1000 λ
    assert relative_error(torch.diagonal(D[..., :-1], dim1=1, dim2=2) + 1, expected) < 1e-4


@DORA
def test_film_layers_equal_formula_with_gradients(use_dora: bool) -> None:
    model = film(use_dora=use_dora)
    with noise_level(model, LEVELS):
        output = model(X)
        output.square().sum().backward()
    expected, tensors = by_hand(model, X, LEVELS, torch.ones(3))
    assert relative_error(output, expected) < 1e-5
    expected.square().sum().backward()
    actual = gradients(model)
    trained = {key for key, tensor in tensors.items() if tensor.requires_grad}
    assert actual.keys() == trained
    for key in trained:
        assert relative_error(actual[key], tensors[key].grad) < 1e-5, key
    with noise_level(model, 0.333):
        assert relative_error(model(X), by_hand(model, X, torch.full((3,), 0.333), torch.ones(3))[0]) < 1e-5


@DORA
def test_film_with_strength_scales_beta_too(use_dora: bool) -> None:
    model = film(use_dora=use_dora)
    set_strength(model, "default", StrengthSchedule([(0, 1.0), (0.3, 1.0), (0.3, -0.5), (0.9, 0.0)]))
    strength = torch.tensor([1.0, -0.5 * (0.9 - 0.333) / 0.6, 0.0]).double()
    with noise_level(model, LEVELS), torch.no_grad():
        assert relative_error(model(X), by_hand(model, X, LEVELS, strength)[0]) < 1e-5


@DORA
def test_film_equals_formula_in_half_parts_and_compiled(use_dora: bool) -> None:
    model = film(use_dora=use_dora)
    expected, _ = by_hand(model, X, LEVELS, torch.ones(3))
    with noise_level(model, LEVELS), torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert relative_error(model(X), expected) < 0.02
        assert relative_error(torch.compile(model, backend="eager")(X), expected) < 1e-5
    half = copy.deepcopy(model).bfloat16()
    assert half.base_model.model.lora_core.cores["default"]["first"].gamma.weight.dtype == torch.float32
    with noise_level(half, LEVELS):
        assert relative_error(half(X.bfloat16()), expected) < 0.02
    levels = torch.tensor([[0.1, 0.7], [0.2, 0.9], [0.5, 0.3]])
    with noise_level(model, levels):  # two λ a sample, for two positions each
        actual = model(X)
    of_parts = by_hand(model, X.reshape(6, 2, 7), levels.flatten(), torch.ones(6))[0]
    assert relative_error(actual, of_parts.reshape(3, 4, 5)) < 1e-5


class Checkpointed(TwoLayers):
    """TwoLayers whose forward is recomputed in backward."""

    def __init__(self) -> None:
        super().__init__()
        self._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    def forward(self, x: Tensor, timestep: Any = None) -> Tensor:
        return self._gradient_checkpointing_func(super().forward, x)


def test_film_under_checkpointing_has_the_same_gradients() -> None:
    recomputed = Checkpointed()
    base = TwoLayers()
    base.load_state_dict(recomputed.state_dict())
    models = film(base), film(recomputed)
    for model in models:
        with noise_level(model, LEVELS):
            loss = model(X).square().sum()
        loss.backward()
    first, second = map(gradients, models)
    assert first.keys() == second.keys()
    for key, gradient in first.items():
        torch.testing.assert_close(second[key], gradient)


def test_film_where_beta_has_no_place_is_refused() -> None:
    for layer in (nn.Conv2d(3, 5, 1), nn.Embedding(9, 5)):
        with pytest.raises(ValueError, match=r"'layer' \((Conv2d|Embedding)\) with core_type 'film'"):
            film(OneLayer(layer), target_modules=["layer"], rank_pattern={})
    with pytest.raises(ValueError, match="core_sharing is 'global', with core_type='film'"):
        nara_config(core_type="film")
    model = film()
    base = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="can't be merged: its core 'film'"):
        model.merge_adapter(noise_level=0.5)
    with pytest.raises(ValueError, match="can't be merged: its core 'film'"), noise_level(model, 0.5):
        model.base_model.model.first.merge()
    torch.testing.assert_close(model.state_dict(), base, rtol=0, atol=0)
    for level in (0.5, "best"):
        with pytest.raises(ValueError, match="no plain LoRA has"):
            to_lora(model, level)  # type: ignore[arg-type]
    assert core_matrix(model, 0.5, module="second").shape == (1, 3, 3)
