"""PEFT's own `convert_to_lora` and `save_as_lora` on adapters with cores: exact inside of a λ, refused outside."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import save_as_lora
from peft.tuners.lora.conversion import convert_to_lora
from torch import nn

from nara_diffusion import StrengthSchedule, noise_level, set_strength, to_lora
from tests.helpers.adapted import OneLayer, TwoLayers, adapted, disturb, lora_config, nara_config, relative_error
from tests.helpers.exported import update_of
from tests.helpers.rounding import rounding_of

TARGETS = ["first", "second"]
LEVEL = 0.37


def base() -> TwoLayers:
    torch.manual_seed(3)
    return TwoLayers()


def folder_of(model: Any, folder: Any, rank: float, level: float = LEVEL) -> PeftModel:
    with noise_level(model, level):
        save_as_lora(folder, model, rank)
    return PeftModel.from_pretrained(base(), str(folder)).eval()


@pytest.mark.parametrize("rank", [4, 9, 1.0], ids=["its own", "a larger", "all"])
@pytest.mark.parametrize("dora", [False, True], ids=["", "DoRA"])
def test_save_as_lora_is_exact_inside_of_a_level(tmp_path, rank, dora):
    model = adapted(base(), target_modules=TARGETS, rank_pattern={"second": 2}, use_dora=dora)
    x = torch.randn(3, 7)
    plain = folder_of(model, tmp_path, rank)
    with noise_level(model, LEVEL), torch.no_grad():
        assert model.supports_lora_conversion()
        assert relative_error(plain(x), model(x)) < 2 * rounding_of(model)


def test_each_name_of_the_function_gives_to_lora_s_tensors():
    model = adapted(base(), target_modules=TARGETS)
    expected = to_lora(model, LEVEL)
    with noise_level(model, LEVEL):
        for convert in (peft.convert_to_lora, peft.tuners.lora.convert_to_lora, convert_to_lora):
            config, tensors = convert(model, rank=4)
            assert config == expected.config
            for key, tensor in expected.state_dict("base_model.model.").items():
                assert torch.equal(tensors[key], tensor)
            assert len(tensors) == 4


def test_models_with_injected_adapters_have_names_without_peft_s_prefix():
    model = inject_adapter_in_model(nara_config(target_modules=TARGETS), base())
    disturb(model)
    with noise_level(model, LEVEL):
        _, tensors = convert_to_lora(model, rank=4)
    assert tensors.keys() == to_lora(model, LEVEL).state_dict().keys()


@pytest.mark.parametrize("rank", [1, 2, 0.9])
def test_a_smaller_rank_is_the_best_approximation_of_that_rank(tmp_path, rank):
    model = adapted(base(), target_modules=TARGETS)
    exact = to_lora(model, LEVEL)
    plain = folder_of(model, tmp_path, rank)
    for name in TARGETS:
        layer = exact.layers[name]
        update = layer.scaling * layer.B.double() @ layer.A.double()
        U, S, Vh = torch.linalg.svd(update, full_matrices=False)
        share = S.square().cumsum(0) / S.square().sum()
        kept = rank if isinstance(rank, int) else int((share < rank).sum()) + 1
        best = U[:, :kept] * S[:kept] @ Vh[:kept]
        cut = getattr(plain.base_model.model, name)
        assert cut.r["default"] == kept
        assert relative_error(update_of(cut), best) < 1e-6


def test_a_constant_core_needs_no_level():
    model = adapted(base(), target_modules=TARGETS, core_type="constant")
    assert model.supports_lora_conversion()
    _, tensors = convert_to_lora(model, rank=4)
    for key, tensor in to_lora(model).state_dict("base_model.model.").items():
        assert torch.equal(tensors[key], tensor)


def test_a_convolution_is_cut_as_its_matrix():
    model = adapted(OneLayer(nn.Conv2d(7, 5, 3)), target_modules=["layer"])
    exact = to_lora(model, LEVEL).layers["layer"]
    with noise_level(model, LEVEL):
        _, tensors = convert_to_lora(model, rank=1)
    A, B = (tensors[f"base_model.model.layer.lora_{factor}.weight"].double() for factor in "AB")
    assert (A.shape, B.shape) == ((1, 7, 3, 3), (5, 1, 1, 1))
    U, S, Vh = torch.linalg.svd(exact.scaling * exact.B.double().flatten(1) @ exact.A.double().flatten(1))
    assert relative_error(exact.scaling * B.flatten(1) @ A.flatten(1), S[0] * U[:, :1] @ Vh[:1]) < 1e-6


def test_a_plain_lora_with_a_strength_is_converted_at_the_level():
    model = get_peft_model(base(), lora_config(target_modules=TARGETS))
    disturb(model)
    set_strength(model, "default", StrengthSchedule([(0, 1), (1, 0)]))
    with pytest.raises(ValueError, match="λ is not known"):
        convert_to_lora(model, rank=4)
    with noise_level(model, LEVEL):
        _, tensors = convert_to_lora(model, rank=4)
    expected = (1 - LEVEL) * model.base_model.model.first.lora_B["default"].weight.double()
    assert relative_error(tensors["base_model.model.first.lora_B.weight"], expected) < 1e-6


@pytest.mark.parametrize("rank", [0, -1, True, 1.5, 0.0, "4"])
def test_ranks_that_are_none_are_refused(rank):
    model = adapted(base(), target_modules=TARGETS)
    with noise_level(model, LEVEL), pytest.raises(ValueError, match=r"rank is .*: pass an int, 1 or more, or a float"):
        convert_to_lora(model, rank)


def test_a_smaller_rank_is_refused_where_the_base_was_changed_by_the_own_one():
    model = adapted(base(), target_modules=TARGETS, init_lora_weights="pissa")
    with noise_level(model, LEVEL), pytest.raises(ValueError, match="init_lora_weights='pissa' has changed the base"):
        convert_to_lora(model, rank=2)


def test_other_adapters_are_converted_by_peft_itself():
    model = get_peft_model(base(), peft.LoHaConfig(r=2, target_modules=TARGETS))
    config, tensors = convert_to_lora(model, rank=3)
    assert config.r == 3
    assert len(tensors) == 4
