"""`to_lora`: the plain LoRA of one λ, or the nearest over all λ, against the update by hand."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils.hotswap import prepare_model_for_compiled_hotswap

from nara_command import main
from nara_diffusion import StrengthSchedule, core_matrix, noise_level, set_strength, to_lora
from tests.acceptance._by_hand import ALPHA, ByHand, leaves, tensors_of
from tests.acceptance._files import PEFT_WEIGHTS, assert_same_tensors
from tests.helpers.adapted import TwoLayers, adapted, disturb, lora_config, nara_config, relative_error
from tests.helpers.rounding import rounding_of

TARGETS = ["first", "second"]
LEVEL = 0.37
EXACT = 1e-6
"""Of the update, as DESIGN.md promises."""


def base() -> TwoLayers:
    torch.manual_seed(3)
    return TwoLayers()


@torch.no_grad()
def updates(model: Any, name: str, adapter_name: str = "default", levels: Any = (LEVEL,)) -> torch.Tensor:
    """ΔW (n, d_out, d_in) of a layer of `base()` by hand, at λ (n,)."""
    by_hand, config = ByHand(base()), model.peft_config[adapter_name]
    tensors, levels = leaves(tensors_of(model, adapter_name)), torch.as_tensor(levels)
    r = len(tensors[f"{name}.lora_A.weight"])
    core = core_matrix(model, levels, adapter_name)[:, :r, :r].double() if r < config.r else None
    weights = by_hand.weights(name, config, tensors, levels, scaling=ALPHA / r, core=core)
    return weights - by_hand.layers[name].weight


def dense(layer: Any) -> torch.Tensor:
    return layer.scaling * layer.B.double() @ layer.A.double()


def test_half_precision_factors_fold_in_separate_float32():
    model = adapted(base(), target_modules=TARGETS).to(torch.bfloat16)
    original = copy.deepcopy(model.state_dict())
    folded = to_lora(model, LEVEL).layers["first"]
    assert (folded.A.dtype, folded.B.dtype) == (torch.bfloat16, torch.float32)
    assert relative_error(dense(folded), updates(model, "first")[0]) < EXACT
    folded.A.zero_()
    assert all(torch.equal(tensor, original[key]) for key, tensor in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_one_of_several_injected_adapters_folds_alone():
    model: Any = inject_adapter_in_model(nara_config(target_modules=["first"]), base())
    inject_adapter_in_model(nara_config(target_modules=["second"], r=3), model, "other")
    disturb(model, seed=8)
    layers = to_lora(model, LEVEL, "other").layers
    assert layers.keys() == {"second"}
    assert relative_error(dense(layers["second"]), updates(model, "second", "other")[0]) < EXACT


@torch.no_grad()
def test_trained_modules_and_biases_are_included(tmp_path):
    model = adapted(base(), target_modules=["first"], modules_to_save=["second"], bias="lora_only")
    model.base_model.model.first.base_layer.bias.data.normal_()
    to_lora(model, LEVEL).save_pretrained(tmp_path)
    x = torch.randn(3, 7)
    with noise_level(model, LEVEL):
        expected = model(x)
    assert relative_error(PeftModel.from_pretrained(base(), tmp_path)(x), expected) < 4 * rounding_of(model)


def test_level_of_context_or_merge_is_used():
    model = adapted(base(), target_modules=TARGETS)
    expected = to_lora(model, LEVEL).state_dict()
    with noise_level(model, LEVEL):
        inside = to_lora(model).state_dict()
    model.merge_adapter(noise_level=LEVEL)
    merged = to_lora(model).state_dict()
    for key, tensor in expected.items():
        assert torch.equal(inside[key], tensor)
        assert torch.equal(merged[key], tensor)


def test_hotswap_padding_is_left_out():
    model = adapted(base(), target_modules=TARGETS)
    expected = to_lora(model, LEVEL).state_dict()
    prepare_model_for_compiled_hotswap(model, target_rank=9)
    torch.testing.assert_close(to_lora(model, LEVEL).state_dict(), expected, rtol=0, atol=0)


# ---------------------------------------------------------------------- the nearest over all λ


def test_best_for_stepped_strength_is_the_exact_mean():
    model: Any = get_peft_model(base(), lora_config(target_modules=TARGETS))
    disturb(model)
    set_strength(model, "default", StrengthSchedule([(0.3, 1.0), (0.3, 0.25)]))
    best = to_lora(model, "best")
    for name in TARGETS:
        assert relative_error(dense(best.layers[name]), 0.475 * updates(model, name)[0]) < EXACT


def test_best_of_knots_is_their_exact_mean():
    model = adapted(base(), target_modules=TARGETS, core_type="knots", core_knots=4)
    best = to_lora(model, "best")
    shares = torch.tensor([1, 2, 2, 1]).double()[:, None, None] / 6
    for name in TARGETS:
        mean = (shares * updates(model, name, levels=torch.linspace(0, 1, 4))).sum(0)
        assert relative_error(dense(best.layers[name]), mean) < EXACT


def error(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> torch.Tensor:
    """‖ΔW − ΔW(λ)‖ over all layers (n,), of the root mean square of ‖ΔW(λ)‖ over λ."""
    squares = torch.stack([(found[name] - update).square().sum((1, 2)) for name, update in wanted.items()]).sum(0)
    size = torch.stack([update.square().sum((1, 2)) for update in wanted.values()]).sum(0).mean()
    return (squares / size).sqrt()


def test_best_is_nearest_lora_and_stores_its_error(tmp_path, capsys):
    model, grid = adapted(base(), target_modules=TARGETS, rank_pattern={"second": 2}), (torch.arange(256) + 0.5) / 256
    expected = {name: updates(model, name, levels=grid) for name in TARGETS}
    best = to_lora(model, noise_level="best")
    assert best.error is not None
    measured = error({name: dense(best.layers[name]) for name in TARGETS}, expected)
    assert best.error.worst_update == pytest.approx(measured.max().item(), rel=0.05)
    assert best.error.mean_update == pytest.approx(measured.square().mean().sqrt().item(), rel=0.02)
    best.save_pretrained(tmp_path / "PlainLora")
    report = json.loads((tmp_path / "PlainLora" / "export_error.json").read_text())
    assert report["worst_update"] == pytest.approx(best.error.worst_update)
    mean = error({name: update.mean(0) for name, update in expected.items()}, expected)
    assert best.error.mean_update == pytest.approx(mean.square().mean().sqrt().item(), rel=1e-3)
    model.save_pretrained(tmp_path / "nara")
    words = ["fold", str(tmp_path / "nara"), str(tmp_path / "lora"), "--form", "peft", "--noise_level"]
    main([*words, "best"])
    assert f"the largest relative error of ΔW is {best.error.worst_update:.2%}" in capsys.readouterr().out
    assert_same_tensors(*(tmp_path / folder / PEFT_WEIGHTS for folder in ("lora", "PlainLora")))
    with pytest.raises(SystemExit):
        main([*words, "bst"])
    assert "expected a number in [0, 1], or best, got 'bst'" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")
def test_best_measures_error_of_grouped_convolutions():
    torch.manual_seed(3)
    model = adapted(torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, groups=2)), target_modules=["0"], r=4)
    best: Any = to_lora(model, "best")

    def update(lora: Any) -> torch.Tensor:
        layer = lora.layers["0"]
        B = torch.block_diag(*layer.B.double().flatten(1).chunk(2))
        return layer.scaling * B @ layer.A.double().flatten(1)

    expected = torch.stack([update(to_lora(model, level)) for level in best.error.noise_levels])
    errors = (expected - update(best)).flatten(1).norm(dim=1)
    weights = torch.tensor(best.error.weights)
    unit = (weights * expected.square().sum((1, 2))).sum().sqrt()
    torch.testing.assert_close(torch.tensor(best.error.update), (errors / unit).float(), rtol=1e-4, atol=1e-6)


def test_best_of_unchanged_adapter_has_no_error():
    best: Any = to_lora(get_peft_model(base(), nara_config(target_modules=TARGETS)), "best")
    assert best.error.worst_update == 0


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {}, "[Pp]ass noise_level"),
    ({}, {"noise_level": 1.5}, "1.5"),
    ({}, {"noise_level": "mean"}, "best"),
    ({}, {"noise_level": LEVEL, "adapter_name": "other"}, "has no adapter 'other'"),
    ({"lora_bias": True}, {"noise_level": LEVEL}, "biases of B"),
]


@pytest.mark.parametrize(("options", "arguments", "message"), REFUSED)
def test_what_is_no_lora_is_refused(options, arguments, message):
    model = adapted(base(), **{"target_modules": TARGETS, **options})
    with pytest.raises(ValueError, match=message):
        to_lora(model, **arguments)
