"""`to_lora` and `to_lora_bins`: plain LoRAs, of one λ or with strengths over λ, against the update by hand."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model

from nara_command import main
from nara_diffusion import StrengthSchedule, core_matrix, noise_level, set_strength, to_lora, to_lora_bins
from nara_diffusion.export import LoraBins, read_lora_bins
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


def test_factors_of_half_precision_fold_in_float32_and_share_nothing_with_the_model():
    model = adapted(base(), target_modules=TARGETS).to(torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    folded = to_lora(model, LEVEL).layers["first"]
    assert (folded.A.dtype, folded.B.dtype) == (torch.bfloat16, torch.float32)
    assert relative_error(dense(folded), updates(model, "first")[0]) < EXACT
    folded.A.zero_()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_one_of_several_injected_adapters_folds_alone():
    model: Any = inject_adapter_in_model(nara_config(target_modules=["first"]), base())
    inject_adapter_in_model(nara_config(target_modules=["second"], r=3), model, "other")
    disturb(model, seed=8)
    layers = to_lora(model, LEVEL, "other").layers
    assert layers.keys() == {"second"}
    assert relative_error(dense(layers["second"]), updates(model, "second", "other")[0]) < EXACT


@torch.no_grad()
def test_modules_and_biases_that_are_trained_with_it_come_along(tmp_path):
    model = adapted(base(), target_modules=["first"], modules_to_save=["second"], bias="lora_only")
    model.base_model.model.first.base_layer.bias.data.normal_()
    to_lora(model, LEVEL).save_pretrained(tmp_path)
    x = torch.randn(3, 7)
    with noise_level(model, LEVEL):
        wanted = model(x)
    assert relative_error(PeftModel.from_pretrained(base(), tmp_path)(x), wanted) < 4 * rounding_of(model)


def test_the_level_of_the_context_and_that_of_a_merge_count():
    model = adapted(base(), target_modules=TARGETS)
    expected = to_lora(model, LEVEL).state_dict()
    with noise_level(model, LEVEL):
        inside = to_lora(model).state_dict()
    model.merge_adapter(noise_level=LEVEL)
    merged = to_lora(model).state_dict()
    for key, tensor in expected.items():
        assert torch.equal(inside[key], tensor)
        assert torch.equal(merged[key], tensor)


# ---------------------------------------------------------------------- several LoRAs


def played(bins: LoraBins, name: str, levels: torch.Tensor) -> torch.Tensor:
    """ΔW (n, d_out, d_in) of the LoRAs with their strengths at λ (n,)."""
    shares = torch.stack([each(levels) for each in bins.schedules]).double()
    return torch.einsum("kn,koi->noi", shares, torch.stack([dense(lora.layers[name]) for lora in bins.loras]))


LEVELS = torch.tensor([0.0, 0.013, 0.2, 0.25, 0.3333, 0.4, 0.5, 0.6, 0.75, 0.8, 0.987, 1.0])


@pytest.mark.parametrize(
    ("config", "points", "number"),
    [
        (nara_config(core_type="knots", core_knots=3, core_sharing="layer"), [(0, 1.0)], 3),
        (nara_config(core_type="constant"), None, 1),
        (lora_config(), [(0.2, 1.5), (0.7, -0.5)], 2),
        (lora_config(), [(0.5, 1.0), (0.5, 0.25)], 2),
    ],
    ids=["knots", "constant", "a LoRA's strength with points", "with a step"],
)
def test_exact_sums_of_loras_are_the_update_at_every_level(config, points, number):
    config.target_modules = set(TARGETS)
    model, schedule = get_peft_model(base(), config), StrengthSchedule(points or [(0, 1.0)])
    disturb(model)
    if points:
        set_strength(model, "default", schedule)
    bins = to_lora_bins(model)
    assert len(bins.loras) == number
    assert bins.error.worst_update < 1e-6
    for name in TARGETS:
        expected = schedule(LEVELS).double()[:, None, None] * updates(model, name, levels=LEVELS)
        assert relative_error(played(bins, name, LEVELS), expected) < 1e-5


def error(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> torch.Tensor:
    """‖ΔW − ΔW(λ)‖ over all layers (n,), of the root mean square of ‖ΔW(λ)‖ over λ."""
    squares = torch.stack([(found[name] - update).square().sum((1, 2)) for name, update in wanted.items()]).sum(0)
    size = torch.stack([update.square().sum((1, 2)) for update in wanted.values()]).sum(0).mean()
    return (squares / size).sqrt()


def test_nearest_lora_and_several_with_strengths_tell_their_measured_errors_also_in_their_folders(tmp_path, capsys):
    model, grid = adapted(base(), target_modules=TARGETS, rank_pattern={"second": 2}), (torch.arange(256) + 0.5) / 256
    wanted = {name: updates(model, name, levels=grid) for name in TARGETS}
    best, bins = to_lora(model, noise_level="best"), to_lora_bins(model, 4)
    shares = torch.stack([schedule(grid) for schedule in bins.schedules])
    torch.testing.assert_close(shares.sum(0), torch.ones(256))
    assert int((shares > 0).sum(0).max()) == 2
    nearest = {name: dense(best.layers[name]) for name in TARGETS}
    for export, found in ((best, nearest), (bins, {name: played(bins, name, grid) for name in TARGETS})):
        measured = error(found, wanted)
        assert export.error.worst_update == pytest.approx(measured.max().item(), rel=0.05)
        assert export.error.mean_update == pytest.approx(measured.square().mean().sqrt().item(), rel=0.02)
        folder = tmp_path / type(export).__name__
        export.save_pretrained(folder)
        report = json.loads((folder / "export_error.json").read_text())
        assert report["worst_update"] == pytest.approx(export.error.worst_update)
    assert bins.error.mean_update < best.error.mean_update
    mean = error({name: update.mean(0) for name, update in wanted.items()}, wanted)
    assert best.error.mean_update == pytest.approx(mean.square().mean().sqrt().item(), rel=1e-3)
    listed = read_lora_bins(tmp_path / "LoraBins")
    assert [path.name for path, _ in listed] == ["lora-0", "lora-1", "lora-2", "lora-3"]
    assert [schedule for _, schedule in listed] == bins.schedules
    with pytest.raises(ValueError, match=r"pass a folder that LoraBins\.save_pretrained wrote"):
        read_lora_bins(listed[0][0])
    model.save_pretrained(tmp_path / "nara")
    words = ["fold", str(tmp_path / "nara"), str(tmp_path / "lora"), "--form", "peft", "--noise_level"]
    main([*words, "best"])
    assert f"the largest relative error of ΔW is {best.error.worst_update:.2%}" in capsys.readouterr().out
    assert_same_tensors(*(tmp_path / folder / PEFT_WEIGHTS for folder in ("lora", "PlainLora")))
    with pytest.raises(SystemExit):
        main([*words, "bst"])
    assert "expected a number in [0, 1], or best, got 'bst'" in capsys.readouterr().err


REFUSED: list[tuple[dict[str, Any], Any, dict[str, Any], str]] = [
    ({}, to_lora, {}, "[Pp]ass noise_level"),
    ({}, to_lora, {"noise_level": 1.5}, "1.5"),
    ({}, to_lora, {"noise_level": "mean"}, "best"),
    ({}, to_lora, {"noise_level": LEVEL, "adapter_name": "other"}, "has no adapter 'other'"),
    ({"lora_bias": True}, to_lora, {"noise_level": LEVEL}, "biases of B"),
    ({}, to_lora_bins, {}, "is not exactly a sum of 2 LoRAs: pass bins, their number"),
    ({}, to_lora_bins, {"bins": 65}, "bins is 65: pass a number of LoRAs, an int from 1 to 64"),
    ({"use_dora": True}, to_lora_bins, {"bins": 3}, "it has DoRA, whose norm"),
    ({"core_type": "bins", "core_bins": 2}, to_lora_bins, {"bins": 3}, "a mask that changes in steps"),
    ({"init_lora_weights": "pissa"}, to_lora_bins, {"bins": 3}, "which has changed the base"),
    ({"target_modules": ["first"], "modules_to_save": ["second"]}, to_lora_bins, {"bins": 3}, "would add again"),
]


@pytest.mark.parametrize(("options", "export", "arguments", "message"), REFUSED)
def test_what_is_no_lora_and_no_sum_of_loras_is_refused(options, export, arguments, message):
    model = adapted(base(), **{"target_modules": TARGETS, **options})
    with pytest.raises(ValueError, match=message):
        export(model, **arguments)
