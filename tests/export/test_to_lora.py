"""`to_lora` and `to_lora_bins`: plain LoRAs, of one λ or with strengths over λ, against the update by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from torch import nn

from nara_diffusion import StrengthSchedule, core_matrix, noise_level, set_strength, to_lora, to_lora_bins
from nara_diffusion.export import read_lora_bins
from tests.acceptance._by_hand import default_core
from tests.helpers.adapted import TwoLayers, adapted, disturb, lora_config, nara_config, relative_error
from tests.helpers.exported import EXACT, loaded, update_of
from tests.helpers.rounding import rounding_of

TARGETS = ["first", "second"]
LEVEL = 0.37


def base() -> TwoLayers:
    torch.manual_seed(3)
    return TwoLayers()


@torch.no_grad()
def assert_same_forward(plain: nn.Module, model: nn.Module) -> None:
    x = torch.randn(3, 7)
    with noise_level(model, LEVEL):
        wanted = model(x)
    assert relative_error(plain(x), wanted) < 4 * rounding_of(model)


def test_factors_of_half_precision_fold_in_float32_and_share_nothing_with_the_model():
    model = adapted(base(), target_modules=TARGETS).to(torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    folded = to_lora(model, LEVEL).layers["first"]
    assert (folded.A.dtype, folded.B.dtype) == (torch.bfloat16, torch.float32)
    core = default_core(model, torch.tensor([LEVEL]))[0]
    update = folded.scaling * folded.B.double() @ folded.A.double()
    assert relative_error(update, update_of(model.base_model.model.first, core=core)) < EXACT
    folded.A.zero_()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_one_of_several_injected_adapters_folds_alone(tmp_path):
    model: Any = inject_adapter_in_model(nara_config(target_modules=["first"]), base())
    inject_adapter_in_model(nara_config(target_modules=["second"], r=3), model, "other")
    disturb(model, seed=8)
    plain = loaded(to_lora(model, LEVEL, "other"), tmp_path, base())
    core = core_matrix(model, LEVEL, "other")[0].detach()
    assert relative_error(update_of(plain.base_model.model.second), update_of(model.second, "other", core)) < EXACT
    assert not hasattr(plain.base_model.model.first, "lora_A")


def test_modules_and_biases_that_are_trained_with_it_come_along(tmp_path):
    model = adapted(base(), target_modules=["first"], modules_to_save=["second"], bias="lora_only")
    model.base_model.model.first.base_layer.bias.data.normal_()
    assert_same_forward(loaded(to_lora(model, LEVEL), tmp_path, base()), model)


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


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({}, {}, "pass noise_level|Pass noise_level"),
        ({}, {"noise_level": 1.5}, "1.5"),
        ({}, {"noise_level": "mean"}, "best"),
        ({}, {"noise_level": LEVEL, "adapter_name": "other"}, "has no adapter 'other'"),
        ({"lora_bias": True}, {"noise_level": LEVEL}, "biases of B"),
    ],
)
def test_what_is_no_lora_of_one_level_is_refused(options, arguments, message):
    with pytest.raises(ValueError, match=message):
        to_lora(adapted(base(), **{"target_modules": TARGETS, **options}), **arguments)


# ---------------------------------------------------------------------- several LoRAs

LEVELS = torch.tensor([0.0, 0.013, 0.2, 0.25, 0.3333, 0.4, 0.5, 0.6, 0.75, 0.8, 0.987, 1.0])


@pytest.mark.parametrize(
    ("options", "points", "number"),
    [
        ({"core_type": "knots", "core_knots": 3, "core_sharing": "layer"}, [(0, 1.0)], 3),
        ({"core_type": "constant"}, [(0, 1.0)], 1),
        (None, [(0.2, 1.5), (0.7, -0.5)], 2),
        (None, [(0.5, 1.0), (0.5, 0.25)], 2),
    ],
    ids=["knots", "constant", "a LoRA's strength with points", "with a step"],
)
def test_exact_sums_of_loras_are_the_update_at_every_level(options, points, number):
    schedule = StrengthSchedule(points)
    if options is None:
        model: Any = get_peft_model(base(), lora_config(target_modules=TARGETS)).eval()
        disturb(model)
        set_strength(model, "default", schedule)
    else:
        model = adapted(base(), target_modules=TARGETS, **options)
    bins = to_lora_bins(model)
    assert len(bins.loras) == number
    assert bins.error.worst_update < 1e-6
    shares = torch.stack([each(LEVELS) for each in bins.schedules]).double()
    for name in TARGETS:
        layers = [lora.layers[name] for lora in bins.loras]
        dense = torch.stack([layer.scaling * layer.B.double() @ layer.A.double() for layer in layers])
        cores = torch.eye(4)[None] if options is None else core_matrix(model, LEVELS, module=name).detach()
        expected = [update_of(model.base_model.model.get_submodule(name), core=C) for C in cores.expand(12, -1, -1)]
        expected = schedule(LEVELS).double()[:, None, None] * torch.stack(expected)
        assert relative_error(torch.einsum("kn,koi->noi", shares, dense), expected) < 1e-5


def test_the_folder_lists_the_loras_and_their_strengths_of_which_two_play_at_once(tmp_path):
    bins = to_lora_bins(adapted(base(), target_modules=TARGETS, rank_pattern={"second": 2}), 4)
    bins.save_pretrained(tmp_path)
    found = read_lora_bins(tmp_path)
    assert [path.name for path, _ in found] == ["lora-0", "lora-1", "lora-2", "lora-3"]
    assert [schedule for _, schedule in found] == bins.schedules
    shares = torch.stack([schedule(LEVELS) for schedule in bins.schedules])
    assert int((shares > 0).sum(0).max()) == 2
    with pytest.raises(ValueError, match=r"pass a folder that LoraBins\.save_pretrained wrote"):
        read_lora_bins(tmp_path / "lora-0")


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({}, {}, "is not exactly a sum of 2 LoRAs: pass bins, their number"),
        ({}, {"bins": 65}, "bins is 65: pass a number of LoRAs, an int from 1 to 64"),
        ({"use_dora": True}, {"bins": 3}, "it has DoRA, whose norm"),
        ({"core_type": "bins", "core_bins": 2}, {"bins": 3}, "core_type 'bins', a mask that changes in steps"),
        ({"init_lora_weights": "pissa"}, {"bins": 3}, "which has changed the base"),
        ({"target_modules": ["first"], "modules_to_save": ["second"]}, {"bins": 3}, "which each LoRA would add again"),
    ],
)
def test_what_is_no_sum_of_loras_is_refused(options, arguments, message):
    model = adapted(base(), **{"target_modules": TARGETS, **options})
    with pytest.raises(ValueError, match=message):
        to_lora_bins(model, **arguments)
