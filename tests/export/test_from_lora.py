"""`from_lora`: a NaRA that is the LoRA at step 0, tensor by tensor and in its forward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn

from nara_diffusion import NaraConfig, from_lora, noise_level, register_core, to_lora
from tests.helpers.adapted import TwoLayers, adapted, disturb, lora_config, nara_config, relative_error
from tests.helpers.core_types import Affine
from tests.helpers.rounding import rounding_of

TARGETS = ["first", "second"]
PATTERNS: dict[str, Any] = {"rank_pattern": {"second": 2}, "alpha_pattern": {"second": 5}}
CORES = [
    {},
    {"core_type": "constant"},
    {"core_type": "knots", "core_sharing": "layer"},
    {"core_sharing": "module_type", "noise_embedding": "mlp"},
    {"core_sharing": "layer", "core_init": "zero_all"},
    {"core_input": "both"},
]


def base() -> TwoLayers:
    torch.manual_seed(3)
    return TwoLayers()


def trained_lora(**options: Any) -> PeftModel:
    model = get_peft_model(base(), lora_config(**{"target_modules": TARGETS, **PATTERNS, **options}))
    disturb(model)
    return model.eval()


def assert_same_tensors(nara: Any, lora: Any, adapter_name: str = "default") -> None:
    held = get_peft_model_state_dict(nara, adapter_name=adapter_name)
    given = get_peft_model_state_dict(lora)
    assert {key for key in held if "nara_core" not in key} == given.keys()
    for key, tensor in given.items():
        assert torch.equal(held[key], tensor), key


def run(model: nn.Module, x: torch.Tensor, level: float | None = None) -> torch.Tensor:
    with torch.no_grad():
        if level is None:
            return model(x)
        with noise_level(model, level, mask_density=0.6):
            return model(x)


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor")  # PEFT of any bias of B
@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}, {"lora_bias": True}], ids=str)
def test_a_folder_of_peft_becomes_a_nara_with_its_tensors_and_forward(tmp_path, options, core):
    lora = trained_lora(**options)
    lora.save_pretrained(tmp_path)
    model = from_lora(tmp_path, base(), **core).eval()
    assert isinstance(model.peft_config["default"], NaraConfig)
    assert_same_tensors(model, lora)
    x = torch.randn(3, 7)
    for level in (0.0, 0.4, 1.0):
        assert relative_error(run(model, x, level), run(lora, x)) < rounding_of(lora)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("lora_A" in name for name in trainable)
    assert any("nara_core" in name for name in trainable)


def test_an_identity_has_the_lora_s_forward_bit_by_bit(tmp_path):
    lora = trained_lora()
    lora.save_pretrained(tmp_path)
    model = from_lora(tmp_path, base(), core_type="identity").eval()
    x = torch.randn(3, 7)
    assert torch.equal(run(model, x), run(lora, x))


def test_there_and_back_is_bit_by_bit(tmp_path):
    lora = trained_lora()
    expected = to_lora(lora)
    model = from_lora(expected, base())
    back = to_lora(model, 0.4)
    assert back.config == expected.config
    for key, tensor in expected.state_dict().items():
        assert torch.equal(back.state_dict()[key], tensor)


@pytest.mark.parametrize("kind", ["model", "plain", "dict"])
def test_models_and_dicts_are_read_too(kind):
    lora = trained_lora()
    state = get_peft_model_state_dict(lora)
    source, options = {
        "model": (lora, {}),
        "plain": (to_lora(lora), {}),
        "dict": (state, {"config": lora.peft_config["default"]}),
    }[kind]
    model = from_lora(source, base(), **options)
    assert_same_tensors(model, lora)
    disturb(model)  # nothing is shared
    assert all(torch.equal(tensor, state[key]) for key, tensor in get_peft_model_state_dict(lora).items())


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_convolutions_and_embeddings_are_read(tmp_path):
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.conv = nn.Embedding(13, 6), nn.Conv1d(6, 4, 3, groups=2)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.conv(self.table(ids).transpose(1, 2))

    clean = Mixed()
    lora = get_peft_model(copy.deepcopy(clean), lora_config(target_modules=["table", "conv"]))
    disturb(lora)
    lora.save_pretrained(tmp_path)
    model = from_lora(tmp_path, copy.deepcopy(clean))
    assert_same_tensors(model, lora)
    ids = torch.randint(13, (3, 5))
    assert relative_error(run(model, ids, 0.4), run(lora, ids)) < 4 * rounding_of(lora)


def test_modules_that_are_trained_with_it_come_along(tmp_path):
    lora = trained_lora(target_modules=["first"], modules_to_save=["second"], rank_pattern={}, alpha_pattern={})
    lora.save_pretrained(tmp_path)
    model = from_lora(tmp_path, base()).eval()
    x = torch.randn(3, 7)
    assert relative_error(run(model, x, 0.4), run(lora, x)) < rounding_of(lora)


@pytest.mark.parametrize("start", ["pissa", "olora", "gaussian", "orthogonal"])
def test_the_start_of_the_lora_is_kept_where_it_has_changed_the_base(tmp_path, start):
    lora = trained_lora(init_lora_weights=start)
    lora.save_pretrained(tmp_path)
    model = from_lora(tmp_path, base()).eval()
    x = torch.randn(3, 7)
    assert relative_error(run(model, x, 0.4), run(lora, x)) < 4 * rounding_of(lora)


def test_a_second_adapter_joins_a_peft_model(tmp_path):
    lora = trained_lora()
    lora.save_pretrained(tmp_path)
    model = adapted(base(), target_modules=["first"])
    before = copy.deepcopy(get_peft_model_state_dict(model))
    assert from_lora(tmp_path, model, "other") is model
    assert model.active_adapters == ["other"]
    assert_same_tensors(model, lora, "other")
    assert all(torch.equal(t, before[key]) for key, t in get_peft_model_state_dict(model).items())


def test_half_precision_of_the_file_or_the_base_changes_no_bit(tmp_path):
    lora = trained_lora()
    lora.save_pretrained(tmp_path)
    assert_same_tensors(from_lora(tmp_path, base().to(torch.bfloat16)), lora)
    half = copy.deepcopy(lora).to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    assert_same_tensors(from_lora(tmp_path / "half", base()), half.float())


def test_a_custom_core_that_is_i_at_first_is_taken(tmp_path):
    register_core("affine of from_lora", Affine)
    assert_same_tensors(from_lora(lora := trained_lora(), base(), core_type="affine of from_lora"), lora)


def test_weights_in_pytorchs_own_format_are_read(tmp_path):
    lora = trained_lora()
    lora.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").is_file()
    assert_same_tensors(from_lora(tmp_path, base()), lora)


def test_training_goes_on_from_it(tmp_path):
    lora = trained_lora()
    model = from_lora(lora, base(), core_scale=0.7, core_hidden_dims=(9,), noise_embedding_dim=8)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x = torch.randn(3, 7)
    with noise_level(model, 0.4):
        model(x).square().mean().backward()
    optimizer.step()
    assert relative_error(run(model, x, 0.4), run(lora, x)) > 1e-4
    other = nara_config(target_modules=TARGETS)
    assert other.core_type == model.peft_config["default"].core_type
