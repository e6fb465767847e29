"""Custom cores: what `register_core` and their answers have to be, and what they may read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from nara_diffusion import core_matrix, noise_level, register_core
from nara_diffusion.cores import registry
from tests.helpers.adapted import OneLayer, TwoLayers, adapted, nara_config, relative_error

LEVELS = torch.tensor([0.05, 0.5, 0.93])


class Affine(nn.Module):
    """C(λ) = I + λ P + Q."""

    def __init__(self, config: Any, rank: int) -> None:
        super().__init__()
        self.P, self.Q = (nn.Parameter(0.1 * torch.randn(rank, rank)) for _ in range(2))

    def forward(self, noise_level: Tensor) -> Tensor:
        return torch.eye(len(self.P)) + noise_level[:, None, None] * self.P + self.Q


class Still(Affine):
    """It reads nothing."""

    needs_noise = False

    def forward(self) -> Tensor:
        return super().forward(torch.tensor([0.5]))


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_custom", {})
    for kind in (Affine, Still):
        register_core(kind.__name__.lower(), kind)


def one_layer(core_type: str) -> PeftModel:
    return adapted(OneLayer(nn.Linear(7, 5)), target_modules=["layer"], core_type=core_type)


def by_hand(model: PeftModel, x: Tensor, level: Tensor) -> Tensor:
    layer, state = model.base_model.model.layer, model.state_dict()
    A, B = (factor["default"].weight.double() for factor in (layer.lora_A, layer.lora_B))
    P, Q = (state[f"base_model.model.nara_core.cores.default.shared.core.{name}"].double() for name in "PQ")
    core = torch.eye(4, dtype=torch.float64) + level.double()[:, None, None] * P + Q
    update = 6 / 4 * torch.einsum("or,brq,qi,bi->bo", B, core.expand(len(x), -1, -1), A, x.double())
    return layer.get_base_layer()(x).double() + update


def test_custom_core_is_read_per_sample() -> None:
    x, affine = torch.randn(3, 7), one_layer("affine")
    with noise_level(affine, LEVELS):
        assert relative_error(affine(x), by_hand(affine, x, LEVELS)) < 2e-6


def test_custom_core_needs_lambda_unless_it_says_otherwise() -> None:
    x, still = torch.randn(3, 7), one_layer("still")
    assert relative_error(still(x), by_hand(still, x, torch.tensor([0.5]))) < 2e-6
    with pytest.raises((ValueError, RuntimeError), match=r"noise_level\(model"):
        one_layer("affine")(x)


def test_name_may_be_registered_again_but_no_built_in_one() -> None:
    register_core("affine", lambda config, rank: Still(config, rank))
    assert one_layer("affine")(torch.randn(3, 7)).shape == (3, 5)
    for name in ("hypernetwork", "bins", "", 3):
        with pytest.raises(ValueError, match=f"^name is {name!r}: choose a text other than 'hypernetwork'"):
            register_core(name, Affine)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="factory is 3: pass a class or function"):
        register_core("other", 3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (torch.eye(3), r"returned \(3, 3\) for 3 value\(s\) of λ and rank 4: return C \(3, 4, 4\), or"),
        (torch.ones(2, 4, 4), r"returned \(2, 4, 4\) for 3 value\(s\) of λ"),
        (3, "returned int for 3"),
    ],
    ids=["of another rank", "of another batch", "no tensor"],
)
def test_answer_of_another_shape_is_refused(answer: Any, message: str) -> None:
    class Wrong(nn.Module):
        def forward(self, noise_level: Tensor) -> Any:
            return answer

    register_core("wrong", lambda config, rank: Wrong())
    model = one_layer("wrong")
    with noise_level(model, LEVELS), pytest.raises(ValueError, match=f"core_type 'wrong' {message}"):
        model(torch.randn(3, 7))


def test_factory_that_makes_no_module_is_refused() -> None:
    register_core("wrong", lambda config, rank: torch.eye(rank))  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match=r"factory of core_type 'wrong' returned Tensor: return a torch\.nn\.Module"):
        one_layer("wrong")


def test_core_of_modules_named_like_methods_of_a_dictionary_is_their_own() -> None:
    base = nn.Module()
    base.keys, base.pop = nn.Linear(7, 5), nn.Linear(7, 5)
    base.forward = lambda x: base.keys(x) + base.pop(x)
    model = adapted(base, target_modules=["keys", "pop"], core_sharing="module_type")
    with noise_level(model, 0.4):
        assert model(torch.randn(2, 7)).shape == (2, 5)
    assert not torch.equal(core_matrix(model, 0.4, module="keys"), core_matrix(model, 0.4, module="pop"))


def test_core_matrix_refuses_a_missing_module_and_adapter_by_name() -> None:
    model = adapted(TwoLayers(), target_modules=["first", "second"], core_sharing="layer")
    with pytest.raises(ValueError, match="2 cores: pass module="):
        core_matrix(model, 0.4)
    with pytest.raises(ValueError, match=r"'third' is not a module adapted by 'default'"):
        core_matrix(model, 0.4, module="third")
    with pytest.raises(ValueError, match="no adapter 'other': the model has 'default'"):
        core_matrix(model, 0.4, "other", module="first")


def test_all_linear_never_adapts_a_core() -> None:
    model = adapted(TwoLayers(), target_modules="all-linear")
    model.add_adapter("other", nara_config(target_modules="all-linear"))
    adapted_modules = {name.split(".lora_A")[0] for name in model.state_dict() if ".lora_A.other" in name}
    assert adapted_modules == {"base_model.model.first", "base_model.model.second"}
