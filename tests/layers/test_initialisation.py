"""Orthonormal directions at the start of training."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from nara_diffusion import NaraConfig, noise_level
from tests.helpers.adapted import OneLayer, TwoLayers, nara_config

LEVELS = torch.tensor([0.0, 0.5, 1.0])
INPUTS = {
    "linear": (nn.Linear(7, 5), torch.randn(3, 7)),
    "conv": (nn.Conv2d(7, 5, 3), torch.randn(3, 7, 6, 6)),
    "embedding": (nn.Embedding(13, 5), torch.randint(13, (3, 6))),
}


@pytest.mark.parametrize("core_type", ["rank_mask", "bins", "hypernetwork", "constant"])
@pytest.mark.parametrize("kind", INPUTS)
def test_directions_are_orthonormal_and_the_model_is_the_base_at_every_level(kind, core_type):
    layer, x = INPUTS[kind]
    base = OneLayer(layer)
    expected = base(x)
    model = get_peft_model(
        base, nara_config(target_modules=["layer"], core_type=core_type, core_bins=2, lora_a_init="orthogonal")
    )
    adapted = model.base_model.model.layer
    if kind == "embedding":
        rows, other = adapted.lora_embedding_B["default"].T, adapted.lora_embedding_A["default"]
    else:
        rows, other = adapted.lora_A["default"].weight.flatten(1), adapted.lora_B["default"].weight
    torch.testing.assert_close(rows @ rows.T, torch.eye(4), rtol=0, atol=1e-6)
    assert not other.any()
    with noise_level(model, LEVELS):
        assert torch.equal(model(x), expected)
    base.layer = layer


def test_each_layer_and_seed_has_its_own_directions():
    def rows(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        config = nara_config(target_modules=["first", "second"], core_type="rank_mask", lora_a_init="orthogonal")
        model = get_peft_model(TwoLayers(), config)
        return [model.base_model.model.get_submodule(name).lora_A["default"].weight for name in ("first", "second")]

    (first, second), (again, _), (other, _) = rows(1), rows(1), rows(2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, second[:, :7])


def test_what_was_trained_is_loaded_and_not_drawn_anew(tmp_path):
    torch.manual_seed(0)
    config = nara_config(target_modules=["first"], core_type="rank_mask", lora_a_init="orthogonal")
    model = get_peft_model(TwoLayers(), config)
    model.base_model.model.first.lora_A["default"].weight.data.mul_(3)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(TwoLayers(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(
            loaded.base_model.model.first.lora_A["default"].weight,
            model.base_model.model.first.lora_A["default"].weight,
        )


def test_half_precision_factors_are_drawn_in_float32():
    config = nara_config(target_modules=["first"], lora_a_init="orthogonal")
    model = get_peft_model(TwoLayers().to(torch.bfloat16), config, autocast_adapter_dtype=False)
    A = model.base_model.model.first.lora_A["default"].weight
    assert A.dtype == torch.bfloat16
    torch.testing.assert_close(A.float() @ A.float().T, torch.eye(4), rtol=0, atol=2e-2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"core_type": "identity"}, "lora_a_init is 'orthogonal', with core_type='identity' .*it needs a core"),
        ({"init_lora_weights": "pissa"}, "and init_lora_weights='pissa': it needs"),
        ({"init_lora_weights": False}, "and init_lora_weights=False: it needs"),
    ],
)
def test_what_contradicts_it_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        NaraConfig(lora_a_init="orthogonal", **fields)


def test_an_unknown_start_is_refused():
    with pytest.raises(ValueError, match="lora_a_init is 'svd': choose one of 'peft', 'orthogonal'"):
        NaraConfig(lora_a_init="svd")
