"""Custom cores: what `register_core` and their answers have to be, and what they may read; which modules have cores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from nara_diffusion import core_matrix, noise_level, register_core
from nara_diffusion.cores import registry
from tests.helpers.adapted import OneLayer, TwoLayers, adapted, nara_config, relative_error


class Still(nn.Module):
    """It reads nothing."""

    needs_noise = False

    def __init__(self, config: Any, rank: int) -> None:
        super().__init__()
        self.P = nn.Parameter(0.1 * torch.randn(rank, rank))

    def forward(self) -> Tensor:
        return self.P[None]


class Answering(nn.Module):
    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, noise_level: Tensor) -> Any:
        return self.answer


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_custom", {})


def one_layer(core: Any) -> PeftModel:
    register_core("mine", core)
    return adapted(OneLayer(nn.Linear(7, 5)), target_modules=["layer"], core_type="mine")


def test_custom_core_needs_lambda_unless_it_says_otherwise() -> None:
    x, model = torch.randn(3, 7), one_layer(Still)
    layer, (P,) = model.base_model.model.layer, (t for name, t in model.named_parameters() if name.endswith("core.P"))
    A, B = (factor["default"].weight.double() for factor in (layer.lora_A, layer.lora_B))
    expected = layer.get_base_layer()(x).double() + 6 / 4 * x.double() @ (B @ P.double() @ A).T
    assert relative_error(model(x), expected) < 2e-6
    with pytest.raises((ValueError, RuntimeError), match=r"noise_level\(model"):
        one_layer(lambda config, rank: Answering(torch.eye(rank)[None]))(x)


def test_name_may_be_registered_again_but_no_built_in_one() -> None:
    register_core("mine", lambda config, rank: Answering(3))
    assert one_layer(Still)(torch.randn(3, 7)).shape == (3, 5)
    for name in ("hypernetwork", "bins", "", 3):
        with pytest.raises(ValueError, match=f"^name is {name!r}: choose a text other than 'hypernetwork'"):
            register_core(name, Still)  # type: ignore[arg-type]
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
    model = one_layer(lambda config, rank: Answering(answer))
    with noise_level(model, torch.rand(3)), pytest.raises(ValueError, match=f"core_type 'mine' {message}"):
        model(torch.randn(3, 7))


def test_factory_that_makes_no_module_is_refused() -> None:
    with pytest.raises(ValueError, match=r"factory of core_type 'mine' returned Tensor: return a torch\.nn\.Module"):
        one_layer(lambda config, rank: torch.eye(rank))


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
    for arguments, message in [
        ({}, "2 cores: pass module="),
        ({"module": "third"}, "'third' is not a module adapted by 'default'"),
        ({"adapter_name": "other"}, "no adapter 'other': the model has 'default'"),
    ]:
        with pytest.raises(ValueError, match=message):
            core_matrix(model, 0.4, **arguments)


def test_all_linear_never_adapts_a_core() -> None:
    model = adapted(TwoLayers(), target_modules="all-linear")
    model.add_adapter("other", nara_config(target_modules="all-linear"))
    adapted_modules = {name.split(".lora_A")[0] for name in model.state_dict() if ".lora_A.other" in name}
    assert adapted_modules == {"base_model.model.first", "base_model.model.second"}
