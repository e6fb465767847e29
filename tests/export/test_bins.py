"""`to_lora_bins`: several LoRAs with strengths over λ, loaded back by this package, against the NaRA itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from nara_diffusion import StrengthSchedule, noise_level, set_strength, to_lora, to_lora_bins
from nara_diffusion.export import LoraBins, read_lora_bins
from tests.helpers.adapted import TwoLayers, adapted, default_core, disturb, lora_config, relative_error
from tests.helpers.exported import update_of
from tests.helpers.rounding import rounding_of
from tests.helpers.small_pipelines import small_sdxl
from tests.loaders.adapters import predict, trained

TARGETS = ["first", "second"]
LEVELS = [0.0, 0.013, 0.2, 0.25, 0.3333, 0.4, 0.5, 0.6, 0.75, 0.8, 0.987, 1.0]

EXACT: dict[str, tuple[dict[str, Any], int]] = {
    "knots": ({"core_type": "knots", "core_knots": 5}, 5),
    "knots by layer": ({"core_type": "knots", "core_knots": 3, "core_sharing": "layer"}, 3),
    "Multi-LoRA": ({"core_type": "bins", "core_bins": 5, "r": 10}, 5),
    "Multi-LoRA, other ranks": ({"core_type": "bins", "core_bins": 2, "rank_pattern": {"second": 2}}, 2),
    "T-LoRA": ({"core_type": "rank_mask", "rank_mask_min": 1}, 4),
    "constant": ({"core_type": "constant"}, 1),
    "identity": ({"core_type": "identity"}, 1),
}


def base() -> TwoLayers:
    torch.manual_seed(3)
    return TwoLayers()


def run(model: Any, x: Tensor, level: float) -> Tensor:
    with torch.no_grad(), noise_level(model, level):
        return model(x)


def by_hand(model: Any, x: Tensor, updates: dict[str, Tensor]) -> Tensor:
    """TwoLayers' forward with ΔW added to its weights, in float64."""
    layers = [getattr(model.base_model.model, name).get_base_layer() for name in TARGETS]
    (W1, b1), (W2, b2) = ((layer.weight.detach().double(), layer.bias.detach().double()) for layer in layers)
    h = torch.tanh(x.double() @ (W1 + updates["first"]).T + b1)
    return (h @ (W2 + updates["second"]).T + b2).float()


def loaded(bins: LoraBins, folder: Path) -> PeftModel:
    """Stock PEFT's folders with this package's strengths, all active together."""
    bins.save_pretrained(folder)
    parts = read_lora_bins(folder)
    assert len(parts) == len(bins.loras)
    model: Any = None
    for index, (path, _) in enumerate(parts):
        if model is None:
            model = PeftModel.from_pretrained(base(), str(path), adapter_name="lora_0")
        else:
            model.load_adapter(str(path), adapter_name=f"lora_{index}")
    model.base_model.set_adapter([f"lora_{index}" for index in range(len(parts))])
    for index, (_, schedule) in enumerate(parts):
        set_strength(model, f"lora_{index}", schedule)
    return model.eval()


@pytest.mark.parametrize(("options", "count"), EXACT.values(), ids=EXACT)
def test_knots_and_masks_are_sums_of_loras_exactly(tmp_path, options, count):
    model = adapted(base(), target_modules=TARGETS, **options)
    bins = to_lora_bins(model)
    assert len(bins.loras) == count
    assert bins.error.worst_update < 1e-6
    again, x = loaded(bins, tmp_path), torch.randn(5, 7)
    for level in LEVELS:
        expected = model(x).detach() if options["core_type"] in ("constant", "identity") else run(model, x, level)
        assert relative_error(run(again, x, level), expected) < 4 * rounding_of(model), level


def test_samples_of_one_lora_share_a_and_masks_keep_what_they_use():
    model = adapted(base(), target_modules=TARGETS, core_type="knots")
    first, *others = to_lora_bins(model).loras
    assert all(torch.equal(lora.layers["first"].A, first.layers["first"].A) for lora in others)
    model = adapted(base(), target_modules=TARGETS, core_type="bins", core_bins=2)
    loras = to_lora_bins(model).loras
    assert [lora.layers["first"].rank for lora in loras] == [2, 2]
    assert [lora.config.r for lora in loras] == [2, 2]
    A = model.base_model.model.first.lora_A["default"].weight
    assert torch.equal(torch.cat([lora.layers["first"].A for lora in loras]), A)
    model = adapted(base(), target_modules=TARGETS, core_type="rank_mask", rank_mask_min=1)
    assert [lora.layers["first"].rank for lora in to_lora_bins(model).loras] == [4, 3, 2, 1]


@pytest.mark.parametrize("count", [2, 5])
def test_strengths_sum_to_one_and_two_are_active_at_most(count):
    bins = to_lora_bins(adapted(base(), target_modules=TARGETS), count)
    levels = torch.linspace(0, 1, 1001)
    shares = torch.stack([schedule(levels) for schedule in bins.schedules])
    torch.testing.assert_close(shares.sum(0), torch.ones(1001), rtol=0, atol=1e-6)
    assert int((shares > 0).sum(0).max()) <= 2
    assert bool((shares >= 0).all())


@pytest.mark.parametrize("options", [{}, {"core_sharing": "layer"}, {"rank_pattern": {"second": 2}}], ids=str)
def test_a_hypernetwork_is_interpolated_and_the_error_is_that_of_dense_matrices(tmp_path, options):
    model = adapted(base(), target_modules=TARGETS, fourier_scale=3.0, **options)
    bins = to_lora_bins(model, 6)
    assert len(bins.loras) == 6
    levels = torch.tensor(bins.error.noise_levels)
    wrong, sizes, played = 0.0, 0.0, {}
    for name in TARGETS:
        group = name if options.get("core_sharing") == "layer" else "shared"
        layer = getattr(model.base_model.model, name)
        own = torch.stack([update_of(layer, core=core) for core in default_core(model, levels, group=group)])
        blended = torch.zeros_like(own)
        for lora, schedule in zip(bins.loras, bins.schedules, strict=True):
            part = lora.layers[name]
            dense = part.scaling * part.B.double() @ part.A.double()
            blended += schedule(levels).double()[:, None, None] * dense
            played.setdefault(name, []).append((dense, schedule))
        wrong, sizes = wrong + (own - blended).square().sum((1, 2)), sizes + own.square().sum((1, 2))
    expected = wrong.sqrt() / (torch.tensor(bins.error.weights) * sizes).sum().sqrt()
    torch.testing.assert_close(torch.tensor(bins.error.update).double(), expected, rtol=1e-4, atol=1e-6)
    again, x = loaded(bins, tmp_path), torch.randn(5, 7)
    for level in (0.1, 0.63):
        updates = {
            name: sum(float(schedule(level)) * part for part, schedule in parts) for name, parts in played.items()
        }
        assert relative_error(run(again, x, level), by_hand(model, x, updates)) < 4 * rounding_of(model)


def test_more_loras_than_knots_are_not_made_and_fewer_have_an_error():
    model = adapted(base(), target_modules=TARGETS, core_type="knots", core_knots=5)
    assert len(to_lora_bins(model, 9).loras) == 5
    three = to_lora_bins(model, 3)
    assert len(three.loras) == 3
    assert three.error.worst_update > 1e-2
    assert len(to_lora_bins(model, 1).loras) == 1


@pytest.mark.parametrize("points", [[(0.2, 1.5), (0.7, -0.5)], [(0.5, 1.0), (0.5, 0.25)], [(0.0, 0.0), (0.0, 1.0)]])
@pytest.mark.parametrize("kind", ["plain", "constant", "bins"])
def test_strengths_with_points_and_steps_are_part_of_the_sum(tmp_path, points, kind):
    if kind == "plain":
        model: Any = get_peft_model(base(), lora_config(target_modules=TARGETS)).eval()
        disturb(model)
    else:
        options = {"core_bins": 2} if kind == "bins" else {}
        model = adapted(base(), target_modules=TARGETS, core_type=kind, **options)
    set_strength(model, "default", StrengthSchedule(points))
    bins = to_lora_bins(model)
    assert bins.error.worst_update < 1e-6
    again, x = loaded(bins, tmp_path), torch.randn(5, 7)
    for level in LEVELS:
        assert relative_error(run(again, x, level), run(model, x, level)) < 1e-4, level


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_diffusers_pipelines_take_the_loras_with_their_schedules(tmp_path):
    pipe = trained(text=False, core_type="knots", core_knots=3, target_modules=["to_q", "conv1", "time_emb_proj"])
    bins = to_lora_bins(pipe.unet)
    other = small_sdxl()
    for index, lora in enumerate(bins.loras):
        state = {f"unet.{key}": tensor for key, tensor in lora.state_dict().items()}
        config = {f"unet.{key}": value for key, value in lora.config.to_dict().items() if value is not None}
        pipe.save_lora_weights(
            tmp_path / str(index), unet_lora_layers=lora.state_dict(), unet_lora_adapter_metadata=_plain(config)
        )
        assert len(state) == 2 * len(lora.layers)
        other.load_lora_weights(tmp_path / str(index), adapter_name=f"lora_{index}")
    other.set_adapters([f"lora_{index}" for index in range(3)], bins.schedules)
    assert relative_error(predict(other), predict(pipe)) < 40 * rounding_of(pipe.unet)
    assert relative_error(predict(small_sdxl()), predict(pipe)) > 1e-3


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    fields = {key.removeprefix("unet."): value for key, value in config.items()}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in fields.items()}


def test_the_folder_has_the_schedules_and_the_error(tmp_path):
    bins = to_lora_bins(adapted(base(), target_modules=TARGETS), 3)
    bins.save_pretrained(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["export_error.json", "export_error.png", "lora-0", "lora-1", "lora-2", "lora_bins.json"]
    content = json.loads((tmp_path / "export_error.json").read_text())
    assert content["worst_update"] == bins.error.worst_update
    with pytest.raises(ValueError, match=r"pass a folder that LoraBins.save_pretrained wrote"):
        read_lora_bins(tmp_path / "lora-0")


def test_a_folder_that_has_more_loras_is_refused_and_stays(tmp_path):
    model = adapted(base(), target_modules=TARGETS)
    to_lora_bins(model, 3).save_pretrained(tmp_path)
    (tmp_path / "lora-notes").mkdir()
    before = (tmp_path / "lora_bins.json").read_bytes()
    with pytest.raises(ValueError, match=r"has 'lora-2' of an earlier export, .* delete it, or name another folder"):
        to_lora_bins(model, 2).save_pretrained(tmp_path)
    assert (tmp_path / "lora_bins.json").read_bytes() == before
    to_lora_bins(model, 4).save_pretrained(tmp_path)
    assert [path.name for path, _ in read_lora_bins(tmp_path)] == ["lora-0", "lora-1", "lora-2", "lora-3"]


def test_the_lora_of_a_knot_is_to_lora_s():
    model = adapted(base(), target_modules=TARGETS, core_type="knots", core_knots=3)
    bins = to_lora_bins(model, 3)
    for level, lora in zip(bins.noise_levels, bins.loras, strict=True):
        expected = to_lora(model, level).state_dict()
        assert all(relative_error(tensor, expected[key]) < 1e-6 for key, tensor in lora.state_dict().items())


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({}, {}, "is not exactly a sum of 2 LoRAs: pass bins, their number"),
        ({}, {"bins": 0}, "bins is 0: pass a number of LoRAs, an int from 1 to 64"),
        ({}, {"bins": 65}, "bins is 65: pass a number of LoRAs, an int from 1 to 64"),
        ({"use_dora": True}, {"bins": 3}, "it has DoRA, whose norm"),
        ({"lora_bias": True}, {"bins": 3}, "it has biases"),
        ({"bias": "all"}, {"bins": 3}, "it has biases"),
        ({"init_lora_weights": "pissa"}, {"bins": 3}, "which has changed the base"),
        ({"target_modules": ["first"], "modules_to_save": ["second"]}, {"bins": 3}, "which each LoRA would add again"),
        (
            {"target_modules": ["first"], "modules_to_save": ["second"], "core_type": "bins", "core_bins": 2},
            {},
            "which each LoRA would add again",
        ),
        ({"core_input": "both"}, {"bins": 3}, "mask density is not known"),
    ],
)
def test_what_is_no_sum_of_loras_is_refused(options, arguments, message):
    model = adapted(base(), **{"target_modules": TARGETS, **options})
    with pytest.raises(ValueError, match=message):
        to_lora_bins(model, **arguments)
