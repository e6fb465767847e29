"""`to_lora_bins`: several LoRAs with strengths over λ, their sum and error against the NaRA by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model

from nara_diffusion import StrengthSchedule, core_matrix, set_strength, to_lora_bins
from nara_diffusion.export import LoraBins, read_lora_bins
from tests.helpers.adapted import TwoLayers, adapted, disturb, lora_config, relative_error
from tests.helpers.exported import update_of

TARGETS = ["first", "second"]
LEVELS = torch.tensor([0.0, 0.013, 0.2, 0.25, 0.3333, 0.4, 0.5, 0.6, 0.75, 0.8, 0.987, 1.0])


def base() -> TwoLayers:
    torch.manual_seed(3)
    return TwoLayers()


def played(bins: LoraBins, name: str) -> torch.Tensor:
    """Σ φ_k(λ) ΔW_k (n, d_out, d_in) of a module, in float64."""
    layers = [lora.layers[name] for lora in bins.loras]
    dense = torch.stack([layer.scaling * layer.B.double() @ layer.A.double() for layer in layers])
    shares = torch.stack([schedule(LEVELS) for schedule in bins.schedules]).double()
    return torch.einsum("kn,koi->noi", shares, dense)


@pytest.mark.parametrize(
    ("options", "number"),
    [({"core_type": "knots", "core_knots": 3, "core_sharing": "layer"}, 3), ({"core_type": "constant"}, 1)],
    ids=str,
)
def test_knots_and_constants_are_sums_of_loras(options, number):
    model = adapted(base(), target_modules=TARGETS, **options)
    bins = to_lora_bins(model)
    assert len(bins.loras) == number
    assert bins.error.worst_update < 1e-6
    for name in TARGETS:
        cores = core_matrix(model, LEVELS, module=name).detach().expand(len(LEVELS), -1, -1)
        updates = [update_of(getattr(model.base_model.model, name), core=core) for core in cores]
        assert relative_error(played(bins, name), torch.stack(updates)) < 1e-5


def test_more_loras_are_nearer_to_a_hypernetwork_and_at_most_two_play_at_once():
    """(tests/acceptance measures the error by dense matrices.)"""
    model = adapted(base(), target_modules=TARGETS, fourier_scale=3.0, rank_pattern={"second": 2})
    bins = to_lora_bins(model, 6)
    levels = torch.tensor(bins.error.noise_levels)
    shares = torch.stack([schedule(levels) for schedule in bins.schedules])
    torch.testing.assert_close(shares.sum(0), torch.ones(len(levels)), rtol=0, atol=1e-6)
    assert int((shares > 0).sum(0).max()) <= 2
    assert to_lora_bins(model, 9).error.mean_update < bins.error.mean_update


@pytest.mark.parametrize("points", [[(0.2, 1.5), (0.7, -0.5)], [(0.5, 1.0), (0.5, 0.25)]])
def test_strengths_with_points_and_steps_are_part_of_the_sum(points):
    model: Any = get_peft_model(base(), lora_config(target_modules=TARGETS)).eval()
    disturb(model)
    schedule = StrengthSchedule(points)
    set_strength(model, "default", schedule)
    bins = to_lora_bins(model)
    assert bins.error.worst_update < 1e-6
    for name in TARGETS:
        own = update_of(getattr(model.base_model.model, name))
        assert relative_error(played(bins, name), schedule(LEVELS).double()[:, None, None] * own) < 1e-5


def test_the_folder_lists_the_loras_and_their_strengths(tmp_path):
    bins = to_lora_bins(adapted(base(), target_modules=TARGETS), 4)
    bins.save_pretrained(tmp_path)
    found = read_lora_bins(tmp_path)
    assert [path.name for path, _ in found] == ["lora-0", "lora-1", "lora-2", "lora-3"]
    assert [schedule for _, schedule in found] == bins.schedules
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
