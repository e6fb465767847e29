"""`nara plot`: its curves against C(λ) of the adapted model, and the picture."""

import pytest
import torch
from matplotlib.figure import Figure
from peft import get_peft_model
from PIL import Image

from nara_diffusion import core_matrix
from nara_diffusion.cli.adapter_file import read
from nara_diffusion.cli.main import main
from nara_diffusion.cli.plot import core_curves
from tests.helpers.adapted import TwoLayers, disturb, nara_config


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"core_type": "knots"},
        {"core_type": "constant"},
        {"core_type": "bins", "core_bins": 2},
        {"core_sharing": "layer"},
    ],
)
def test_curves_are_those_of_the_adapted_model(tmp_path, changes):
    model = get_peft_model(TwoLayers(), nara_config(target_modules=["first", "second"], **changes))
    disturb(model)
    model.save_pretrained(tmp_path)
    levels = torch.linspace(0, 1, 7)
    distances, values = core_curves(read(str(tmp_path)).parts["model"], levels)
    modules = ["first", "second"] if changes.get("core_sharing") == "layer" else [None]
    assert len(distances) == len(modules)
    for index, module in enumerate(modules):
        with torch.no_grad():
            C = core_matrix(model, levels, module=module).expand(7, -1, -1).double()
        I = torch.eye(C.shape[-1], dtype=torch.float64)  # noqa: E741
        torch.testing.assert_close(distances[index], (C - I).flatten(1).norm(dim=1) / I.norm(), rtol=1e-6, atol=1e-9)
        grams = torch.linalg.eigvalsh(C.mT @ C).clamp(min=0).sqrt().flip(-1)
        torch.testing.assert_close(values[index], grams, rtol=1e-4, atol=1e-5)


def test_picture_is_written_where_it_was_asked_for(tmp_path, capsys):
    model = get_peft_model(TwoLayers(), nara_config(target_modules=["first"], strength=[[0, 1.0], [1, 0.5]]))
    disturb(model)
    model.save_pretrained(tmp_path / "adapter")
    main(["plot", str(tmp_path / "adapter"), "--output", str(tmp_path / "core.png"), "--points", "11"])
    assert capsys.readouterr().out == f"{tmp_path / 'core.png'}\n"
    with Image.open(tmp_path / "core.png") as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 50


def test_strength_below_zero_is_within_the_picture(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **options: (figures.append(self), path.write_bytes(b"")))
    for name, lowest in (("positive", 0.5), ("negative", -2.0)):
        model = get_peft_model(TwoLayers(), nara_config(target_modules=["first"], strength=[[0, 1.0], [1, lowest]]))
        model.save_pretrained(tmp_path / name)
        main(["plot", str(tmp_path / name), "--output", str(tmp_path / "core.png")])
        axes = figures[-1].axes[2]
        assert axes.get_ylabel() == "strength"
        assert axes.get_ylim()[0] == min(0.0, lowest)
        assert axes.get_ylim()[1] >= 1


def test_core_that_reads_the_mask_density_has_no_curve(tmp_path):
    config = nara_config(target_modules=["first"], core_input="both", noise_convention="masked_share")
    get_peft_model(TwoLayers(), config).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="error: the core reads the mask density"):
        main(["plot", str(tmp_path), "--output", str(tmp_path / "core.png")])
    assert not (tmp_path / "core.png").exists()


def test_picture_in_a_new_folder_is_written_and_a_folder_is_no_picture(tmp_path):
    get_peft_model(TwoLayers(), nara_config(target_modules=["first"])).save_pretrained(tmp_path / "adapter")
    words = ["plot", str(tmp_path / "adapter"), "--points", "3", "--output"]
    main([*words, str(tmp_path / "new" / "deeper" / "core.png")])
    assert (tmp_path / "new" / "deeper" / "core.png").is_file()
    with pytest.raises(SystemExit, match=r"error: --output .*new is a folder: name a PNG file"):
        main([*words, str(tmp_path / "new")])


def test_too_few_points_end_in_one_line(tmp_path):
    with pytest.raises(SystemExit, match="error: --points is 1, expected at least 2"):
        main(["plot", str(tmp_path), "--points", "1"])
