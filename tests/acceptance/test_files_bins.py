"""NaRAs as one LoRA, or several with strengths, for all λ: exact where they can be, else with the measured error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from nara_diffusion import StrengthSchedule, core_matrix, set_strength, to_lora, to_lora_bins
from tests.acceptance import _bases, _files

PEFT = _files.FILES / "peft"

pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in tiny-language:UserWarning")


def language(name: str) -> PeftModel:
    return PeftModel.from_pretrained(_bases.language_model(), PEFT / name).eval()


@torch.no_grad()
def naras_updates(model: PeftModel, levels: Tensor) -> dict[str, Tensor]:
    """{module: ΔW (n, d_out, d_in)} of the stored "nara" by its definition, in float64."""
    tensors = load_file(PEFT / "nara" / _files.PEFT_WEIGHTS)
    C = core_matrix(model, levels).double()
    found = {}
    for name in _files.layers_of(tensors):
        A, B = (tensors[f"{name}.lora_{kind}.weight"].double() for kind in "AB")
        r = len(A)
        alpha = 7 if "q_proj" in name else 5
        found[name] = alpha / r * torch.einsum("or,nrs,si->noi", B, C[:, :r, :r], A)
    return found


def loras_updates(folder: Path) -> dict[str, Tensor]:
    """{module: ΔW (d_out, d_in)} of a LoRA in PEFT's form, in float64."""
    model = PeftModel.from_pretrained(_bases.language_model(), folder)
    return {
        f"base_model.model.{name}": layer.get_delta_weight("default").detach().double()
        for name, layer in model.base_model.model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


def error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> Tensor:
    """‖ΔW − ΔW(λ)‖ over all layers (n,), of the root mean square of ‖ΔW(λ)‖ over λ."""
    assert found.keys() == wanted.keys()
    squares = torch.stack([(found[name] - update).square().sum((1, 2)) for name, update in wanted.items()]).sum(0)
    size = torch.stack([update.square().sum((1, 2)) for update in wanted.values()]).sum(0).mean()
    return (squares / size).sqrt()


GRID = (torch.arange(256) + 0.5) / 256


def test_nearest_lora_over_all_levels_tells_its_measured_error(tmp_path: Path) -> None:
    model = language("nara")
    lora = to_lora(model, noise_level="best")
    lora.save_pretrained(tmp_path)
    wanted = naras_updates(model, GRID)
    measured = error(loras_updates(tmp_path), wanted)
    assert lora.error is not None
    assert lora.error.worst_update == pytest.approx(measured.max().item(), rel=0.02)
    assert lora.error.mean_update == pytest.approx(measured.square().mean().sqrt().item(), rel=0.02)
    assert measured.max() > 0.1
    mean = {name: update.mean(0) for name, update in wanted.items()}
    assert measured.square().mean() == pytest.approx(error(mean, wanted).square().mean().item(), rel=1e-3)
    report = json.loads((tmp_path / "export_error.json").read_text())
    assert report["worst_update"] == pytest.approx(lora.error.worst_update)


def played(folders: list[Path], schedules: list[StrengthSchedule]) -> PeftModel:
    """Several LoRAs in PEFT, each at its strength over λ."""
    model = PeftModel.from_pretrained(_bases.language_model(), folders[0], adapter_name="0")
    for index, folder in enumerate(folders[1:], start=1):
        model.load_adapter(str(folder), adapter_name=str(index))
    model.base_model.set_adapter([str(index) for index in range(len(folders))])
    for index, schedule in enumerate(schedules):
        set_strength(model, str(index), schedule)
    return model.eval()


@pytest.mark.parametrize(("name", "number"), [("knots", 4), ("bins", 3), ("rank_mask", 4)])
def test_loras_and_strengths_of_knots_bins_and_masks_are_the_nara(name: str, number: int, tmp_path: Path) -> None:
    nara = language(name)
    parts = to_lora_bins(nara)
    assert len(parts.loras) == len(parts.schedules) == number
    assert parts.error.worst_update < 1e-5
    for index, lora in enumerate(parts.loras):
        lora.save_pretrained(tmp_path / str(index))
    host = played([tmp_path / str(index) for index in range(number)], parts.schedules)
    _files.assert_near(_bases.text_output(host), _files.expected("peft")[name], host)
