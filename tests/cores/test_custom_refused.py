"""Custom cores: names, factories and answers that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from nara_diffusion import NaraConfig, noise_level, register_core
from nara_diffusion.cores import custom as custom_cores
from tests.helpers.adapted import OneLayer, adapted
from tests.helpers.core_types import Affine, Still

LEVELS = torch.tensor([0.05, 0.5, 0.93])


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(custom_cores, "_factories", {})
    register_core("affine", Affine)


def one_layer(**changes: Any) -> PeftModel:
    return adapted(OneLayer(nn.Linear(7, 5)), target_modules=["layer"], **changes)


def test_a_name_may_be_registered_again_but_no_built_in_one():
    register_core("affine", lambda config, rank: Still(config, rank))
    assert one_layer(core_type="affine")(torch.randn(3, 7)).shape == (3, 5)
    for name in ("hypernetwork", "bins", "", 3):
        with pytest.raises(ValueError, match=f"^name is {name!r}: choose a text other than 'hypernetwork'"):
            register_core(name, Affine)
    with pytest.raises(ValueError, match="factory is 3: pass a class or function"):
        register_core("other", 3)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda level: torch.eye(3), r"returned \(3, 3\) for 3 value\(s\) of λ and rank 4: return C \(3, 4, 4\), or"),
        (lambda level: torch.ones(2, 4, 4), r"returned \(2, 4, 4\) for 3 value\(s\) of λ"),
        (lambda level: 3, "returned int for 3"),
    ],
)
def test_an_answer_of_another_shape_is_refused(answer, message):
    class Wrong(nn.Module):
        def __init__(self, config: NaraConfig, rank: int) -> None:
            super().__init__()

        def forward(self, noise_level: Tensor) -> Any:
            return answer(noise_level)

    register_core("wrong", Wrong)
    model = one_layer(core_type="wrong")
    with noise_level(model, LEVELS), pytest.raises(ValueError, match=f"core_type 'wrong' {message}"):
        model(torch.randn(3, 7))


def test_a_factory_that_makes_no_module_is_refused():
    register_core("wrong", lambda config, rank: torch.eye(rank))
    with pytest.raises(ValueError, match=r"factory of core_type 'wrong' returned Tensor: return a torch\.nn\.Module"):
        one_layer(core_type="wrong")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_lora_weights": "pissa"}, "core_type='affine' does not promise"),
        ({"rank_mask_min": 2}, "it is for core_type='rank_mask'"),
    ],
)
def test_options_of_built_in_cores_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        NaraConfig(core_type="affine", **fields)
