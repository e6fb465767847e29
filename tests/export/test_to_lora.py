"""`to_lora`: the plain LoRA of one λ, loaded by stock PEFT, against the update by hand in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from nara_diffusion import StrengthSchedule, noise_level, register_core, set_strength, to_lora
from tests.helpers.adapted import (
    OneLayer,
    TwoLayers,
    adapted,
    default_core,
    disturb,
    lora_config,
    nara_config,
    relative_error,
)
from tests.helpers.core_types import TYPES, Affine
from tests.helpers.exported import EXACT, assert_same_update, loaded, update_of
from tests.helpers.layers.formulas import CONVOLUTIONS, LINEARS
from tests.helpers.pipelines.unet import tiny_unet
from tests.helpers.rounding import rounding_of

TARGETS = ["first", "second"]
PATTERNS: dict[str, Any] = {"rank_pattern": {"second": 2}, "alpha_pattern": {"second": 5}}
LEVEL = 0.37

CORES = {
    **TYPES,
    "NaRA": {},
    "kaiming": {"core_init": "kaiming"},
    "by layer": {"core_sharing": "layer"},
    "by type": {"core_sharing": "module_type"},
    "knots by layer": {"core_type": "knots", "core_sharing": "layer"},
}


def base() -> TwoLayers:
    torch.manual_seed(3)
    return TwoLayers()


def core_of(model: Any, layer: str, level: float = LEVEL) -> torch.Tensor:
    """C (r, r) of that layer by hand."""
    config = model.peft_config["default"]
    group = {"layer": layer, "module_type": layer}.get(config.core_sharing, "shared")
    return default_core(model, torch.tensor([level]), group=group)[0]


def run(model: nn.Module, x: torch.Tensor, level: float | None = None) -> torch.Tensor:
    with torch.no_grad():
        if level is None:
            return model(x)
        with noise_level(model, level, mask_density=0.6):
            return model(x)


@pytest.mark.parametrize("options", CORES.values(), ids=CORES)
def test_each_core_type_and_sharing_folds_to_the_update_at_that_level(tmp_path, options):
    model = adapted(base(), target_modules=TARGETS, **options)
    plain = loaded(to_lora(model, LEVEL), tmp_path, base())
    for name in TARGETS:
        layers = (getattr(each.base_model.model, name) for each in (plain, model))
        assert_same_update(*layers, core_of(model, name))
    x = torch.randn(3, 7)
    assert relative_error(run(plain, x), run(model, x, LEVEL)) < rounding_of(plain)
    if options.get("core_type") != "constant":
        assert relative_error(run(plain, x), run(model, x, 0.9)) > 1e-3


@pytest.mark.parametrize("options", [{}, {"core_type": "knots"}, {"core_type": "constant"}, {"use_rslora": True}])
def test_rank_and_alpha_patterns_are_kept(tmp_path, options):
    model = adapted(base(), target_modules=TARGETS, **PATTERNS, **options)
    lora = to_lora(model, LEVEL)
    assert lora.config.rank_pattern == {"second": 2}
    assert {name: layer.rank for name, layer in lora.layers.items()} == {"first": 4, "second": 2}
    plain = loaded(lora, tmp_path, base())
    for name in TARGETS:
        layers = [getattr(each.base_model.model, name) for each in (plain, model)]
        assert_same_update(*layers, core_of(model, name))
        assert lora.layers[name].scaling == pytest.approx(layers[1].scaling["default"], rel=1e-12)


def test_a_custom_core_folds(tmp_path):
    register_core("affine of export", Affine)
    model = adapted(base(), target_modules=TARGETS, core_type="affine of export")
    plain = loaded(to_lora(model, LEVEL), tmp_path, base())
    core = model.base_model.model.nara_core.cores["default"]["shared"].core
    expected = torch.eye(4, dtype=torch.float64) + LEVEL * core.P.double() + core.Q.double()
    for name in TARGETS:
        assert_same_update(
            getattr(plain.base_model.model, name), getattr(model.base_model.model, name), expected.detach()
        )


LAYERS: dict[str, Any] = {
    **{name: (make, torch.randn(3, 4, 7)) for name, make in LINEARS.items()},
    **{name: (make, torch.randn(shape)) for name, (make, shape) in CONVOLUTIONS.items()},
    "embedding": (lambda: nn.Embedding(13, 5), torch.randint(13, (3, 4))),
}


@pytest.mark.parametrize(
    ("name", "dora"),
    [(name, dora) for name in LAYERS for dora in (False, True) if (name, dora) != ("embedding", True)],  # refused
)
def test_each_kind_of_layer_folds(tmp_path, name, dora):
    make, x = LAYERS[name]
    layer = make()
    options = {"target_modules": ["layer"], "fan_in_fan_out": isinstance(layer, Conv1D), "use_dora": dora}
    model = adapted(OneLayer(copy.deepcopy(layer)), **options)
    lora = to_lora(model, LEVEL)
    assert lora.config.use_dora == dora
    assert (lora.layers["layer"].magnitude is not None) == dora
    plain = loaded(lora, tmp_path, OneLayer(copy.deepcopy(layer)))
    core = default_core(model, torch.tensor([LEVEL]))[0]
    assert_same_update(plain.base_model.model.layer, model.base_model.model.layer, core)
    assert relative_error(run(plain, x), run(model, x, LEVEL)) < 4 * rounding_of(plain)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_a_convolution_with_groups_folds_into_a(tmp_path):
    layer = nn.Conv2d(6, 8, 3, padding=1, groups=2)
    model = adapted(OneLayer(copy.deepcopy(layer)), target_modules=["layer"])
    lora = to_lora(model, LEVEL)
    assert torch.equal(lora.layers["layer"].B, model.base_model.model.layer.lora_B["default"].weight)
    plain = loaded(lora, tmp_path, OneLayer(copy.deepcopy(layer)))
    x = torch.randn(3, 6, 5, 4)
    assert relative_error(run(plain, x), run(model, x, LEVEL)) < 4 * rounding_of(plain)
    assert relative_error(run(plain, x), run(model, x, 0.9)) > 1e-3


def test_the_model_is_as_it_was_and_shares_nothing_with_the_lora():
    model = adapted(base(), target_modules=TARGETS, core_type="identity")
    before, config = copy.deepcopy(model.state_dict()), copy.deepcopy(model.peft_config["default"])
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    lora = to_lora(model)
    kept = {key: tensor.clone() for key, tensor in lora.state_dict().items()}
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])
    assert model.peft_config["default"] == config
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    disturb(model, seed=5)
    assert all(torch.equal(tensor, kept[key]) for key, tensor in lora.state_dict().items())


def test_an_identity_keeps_its_factors_bit_by_bit():
    model = adapted(base(), target_modules=TARGETS, core_type="identity").to(torch.bfloat16)
    for key, tensor in to_lora(model).state_dict("base_model.model.").items():
        held = model.state_dict()[key.replace(".weight", ".default.weight")]
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, held)


def test_factors_of_half_precision_fold_in_float32():
    model = adapted(base(), target_modules=TARGETS).to(torch.bfloat16)
    lora = to_lora(model, LEVEL)
    layer, core = model.base_model.model.first, default_core(model, torch.tensor([LEVEL]))[0]
    folded = lora.layers["first"]
    assert (folded.A.dtype, folded.B.dtype) == (torch.bfloat16, torch.float32)
    update = folded.scaling * folded.B.double() @ folded.A.double()
    assert relative_error(update, update_of(layer, core=core)) < EXACT


@pytest.mark.parametrize("kind", ["NaRA", "plain LoRA", "identity"])
def test_a_strength_that_depends_on_the_level_is_part_of_the_lora(tmp_path, kind):
    points = [(0.1, 1.5), (0.6, -0.4)]
    config = lora_config if kind == "plain LoRA" else nara_config
    options = {"core_type": "identity"} if kind == "identity" else {}
    model = get_peft_model(base(), config(target_modules=TARGETS, **PATTERNS, **options))
    disturb(model)
    set_strength(model, "default", StrengthSchedule(points))
    plain = loaded(to_lora(model, LEVEL), tmp_path, base())
    strength = 1.5 - 1.9 * (LEVEL - 0.1) / 0.5
    core = default_core(model, torch.tensor([LEVEL]))[0] if kind == "NaRA" else torch.eye(4, dtype=torch.float64)
    for name in TARGETS:
        layers = (getattr(each.base_model.model, name) for each in (plain, model))
        assert_same_update(*layers, strength * core)


def test_a_strength_that_is_a_number_goes_into_b(tmp_path):
    model = adapted(base(), target_modules=TARGETS, **PATTERNS)
    set_strength(model, "default", -0.3)
    lora = to_lora(model, LEVEL)
    assert (lora.config.lora_alpha, lora.config.alpha_pattern) == (6, {"second": 5})
    x = torch.randn(3, 7)
    assert relative_error(run(loaded(lora, tmp_path, base()), x), run(model, x, LEVEL)) < rounding_of(model)


def test_injected_adapters_fold_as_wrapped_ones(tmp_path):
    model = inject_adapter_in_model(nara_config(target_modules=TARGETS), base())
    disturb(model)
    x = torch.randn(3, 7)
    assert relative_error(run(loaded(to_lora(model, LEVEL), tmp_path, base()), x), run(model, x, LEVEL)) < rounding_of(
        model
    )


def test_an_adapter_of_diffusers_folds(tmp_path):
    torch.manual_seed(2)
    unet = tiny_unet()
    clean = copy.deepcopy(unet)
    unet.add_adapter(nara_config(target_modules=["to_q", "to_out.0", "conv1", "time_emb_proj"]), adapter_name="style")
    disturb(unet)
    inputs = (torch.randn(2, 3, 8, 8), torch.tensor(370), torch.randn(2, 5, 12))
    plain = loaded(to_lora(unet, LEVEL, "style"), tmp_path, clean)
    with torch.no_grad():
        expected, actual = unet(*inputs).sample, plain(*inputs).sample
    assert relative_error(actual, expected) < 4 * rounding_of(plain)


def test_one_of_several_adapters_folds_alone(tmp_path):
    model = adapted(base(), target_modules=["first"])
    model.add_adapter("other", nara_config(target_modules=["second"], r=3))
    disturb(model, seed=8)
    plain = loaded(to_lora(model, LEVEL, "other"), tmp_path, base())
    core = default_core(model, torch.tensor([LEVEL]), "other")[0]
    actual = update_of(plain.base_model.model.second)
    assert relative_error(actual, update_of(model.base_model.model.second, "other", core)) < EXACT
    assert not hasattr(plain.base_model.model.first, "lora_A")


def test_modules_and_biases_that_are_trained_with_it_come_along(tmp_path):
    options = {"target_modules": ["first"], "modules_to_save": ["second"], "bias": "lora_only"}
    model = adapted(base(), **options)
    bias = model.base_model.model.first.base_layer.bias
    bias.data.normal_()
    x = torch.randn(3, 7)
    plain = loaded(to_lora(model, LEVEL), tmp_path, base())
    assert relative_error(run(plain, x), run(model, x, LEVEL)) < rounding_of(model)


def test_the_bias_of_b_is_scaled_as_it_was(tmp_path):
    model = adapted(base(), target_modules=TARGETS, lora_bias=True)
    set_strength(model, "default", 0.4)
    x = torch.randn(3, 7)
    plain = loaded(to_lora(model, LEVEL), tmp_path, base())
    assert relative_error(run(plain, x), run(model, x, LEVEL)) < rounding_of(model)


@pytest.mark.parametrize("start", ["pissa", "olora", "orthogonal"])
def test_starts_that_change_the_base_are_kept(tmp_path, start):
    model = adapted(base(), target_modules=TARGETS, init_lora_weights=start)
    x = torch.randn(3, 7)
    plain = loaded(to_lora(model, LEVEL), tmp_path, base())
    assert relative_error(run(plain, x), run(model, x, LEVEL)) < 4 * rounding_of(model)


def test_modules_that_the_configuration_does_not_name_are_named(tmp_path):
    model = nn.ModuleDict({"layer": nn.Linear(7, 5), "block": nn.ModuleDict({"layer": nn.Linear(7, 5)})})
    clean = copy.deepcopy(model)
    config = nara_config(target_modules=["layer"])
    state = {"layer.lora_A.weight": torch.zeros(4, 7), "layer.lora_B.weight": torch.zeros(5, 4)}
    with pytest.warns(RuntimeWarning, match="additional target modules"):
        inject_adapter_in_model(config, model, state_dict=state)
    disturb(model)
    lora = to_lora(model, LEVEL)
    assert list(lora.layers) == ["layer"]
    plain = loaded(lora, tmp_path, clean)
    assert not hasattr(plain.base_model.model["block"]["layer"], "lora_A")


def test_the_mask_density_is_a_signal_too(tmp_path):
    model = adapted(base(), target_modules=TARGETS, core_input="both")
    with pytest.raises(ValueError, match="mask density is not known"):
        to_lora(model, LEVEL)
    plain = loaded(to_lora(model, LEVEL, mask_density=0.6), tmp_path, base())
    x = torch.randn(3, 7)
    assert relative_error(run(plain, x), run(model, x, LEVEL)) < rounding_of(model)


def test_the_level_of_the_context_and_that_of_a_merge_count():
    model = adapted(base(), target_modules=TARGETS)
    expected = to_lora(model, LEVEL).state_dict()
    with noise_level(model, LEVEL):
        inside = to_lora(model).state_dict()
    model.merge_adapter(noise_level=LEVEL)
    merged, other = to_lora(model).state_dict(), to_lora(model, 0.9).state_dict()
    model.unmerge_adapter()
    for key, tensor in expected.items():
        assert torch.equal(inside[key], tensor)
        assert torch.equal(merged[key], tensor)
        assert torch.equal(other[key], tensor) == ("lora_A" in key)
