"""inspect, plot and convert: their figures by hand, and conversions tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file

import nara_command
from nara_diffusion import StrengthSchedule, core_matrix
from nara_diffusion.cli.commands import core_curves
from nara_diffusion.loaders.file import AdapterFile
from tests.helpers.adapted import TwoLayers, adapted, disturb, nara_config
from tests.helpers.small_pipelines import small_sd
from tests.helpers.tlora_files import NAMES, SDXL, SETTINGS, lycoris_file, repository_file, saved

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PIPELINE_WEIGHTS = "pytorch_nara_weights.safetensors"
TARGETS = ["first", "second"]


def run(*words: object) -> None:
    nara_command.main([str(word) for word in words])


def folder_of(path: Path, **changes: Any) -> Path:
    """PEFT's folder of a disturbed NaRA of ranks 4 and 3 on `TwoLayers`."""
    adapted(TwoLayers(), target_modules=TARGETS, rank_pattern={"second": 3}, **changes).save_pretrained(str(path))
    return path


def inspected(capsys: pytest.CaptureFixture[str], path: Path) -> dict[str, Any]:
    run("inspect", path, "--json")
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("changes", "core", "size"),
    [
        ({"core_type": "constant", "core_sharing": "layer"}, {"core_scale": 0.7, "core_sharing": "layer"}, 16 + 9),
        ({"core_type": "identity"}, {}, 0),
        ({"core_type": "bins", "core_bins": 2, "rank_pattern": {}}, {"core_bins": 2}, 0),
    ],
    ids=["constant", "identity", "bins"],
)
def test_inspect_counts_parameters_and_shows_core_fields(changes, core, size, tmp_path, capsys) -> None:
    ranks = {"rank_pattern": {"second": 3}} | changes
    model = get_peft_model(TwoLayers(), nara_config(target_modules=TARGETS, **ranks))
    model.save_pretrained(str(tmp_path))
    (part,) = inspected(capsys, tmp_path)["components"].values()
    second = 3 if ranks["rank_pattern"] else 4
    assert part["core"] == core
    assert part["parameters"] == {"core": size, "factors": 4 * (7 + 11) + second * (11 + 5)}
    assert part["module_kinds"] == {"first": 1, "second": 1}
    assert part["ranks"] == sorted({4, second})
    assert part["dtypes"] == ["float32"]


def test_inspect_prints_set_fields_one_per_line(tmp_path, capsys) -> None:
    folder = folder_of(tmp_path, core_type="constant", strength=[[0, 1], [1, 0.25]])
    run("inspect", folder)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(f"sha256 {inspected(capsys, folder)['sha256']}")
    rows = dict(line.strip().split(None, 1) for line in lines[3:])
    assert lines[2] == "model: NaRA"
    assert rows["module_kinds"] == "first 1, second 1"
    assert rows["noise_convention"] == "not stated"
    assert rows["strength"] == "[0.0, 1.0], [1.0, 0.25]"
    assert {"use_rslora", "method"}.isdisjoint(rows)


@pytest.mark.parametrize("changes", [{"core_sharing": "layer"}, {"core_type": "bins", "core_bins": 2}], ids=str)
def test_curves_are_those_of_the_adapted_model(tmp_path, changes):
    model = get_peft_model(TwoLayers(), nara_config(target_modules=TARGETS, **changes))
    disturb(model)
    model.save_pretrained(tmp_path)
    levels = torch.linspace(0, 1, 7)
    distances, values = core_curves(AdapterFile.read(tmp_path).parts["model"], levels)
    for index, module in enumerate(TARGETS[: len(distances)]):
        with torch.no_grad():
            C = core_matrix(model, levels, module=module).expand(7, -1, -1).double()
        I = torch.eye(C.shape[-1], dtype=torch.float64)  # noqa: E741
        torch.testing.assert_close(distances[index], (C - I).flatten(1).norm(dim=1) / I.norm(), rtol=1e-6, atol=1e-9)
        grams = torch.linalg.eigvalsh(C.mT @ C).clamp(min=0).sqrt().flip(-1)
        torch.testing.assert_close(values[index], grams, rtol=1e-4, atol=1e-5)


def test_lower_rank_core_has_nan_singular_values(tmp_path) -> None:
    part = AdapterFile.read(folder_of(tmp_path, core_sharing="layer")).parts["model"]
    distances, values = core_curves(part, torch.linspace(0, 1, 5))
    assert distances.shape == (2, 5)
    assert values.shape == (2, 5, 4)
    assert values.isnan().nonzero().tolist() == [[1, level, 3] for level in range(5)]


def test_plot_draws_a_row_per_component_with_strength(tmp_path, monkeypatch) -> None:
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])
    schedule = [[0.0, 1.0], [1.0, 0.25]]
    run("plot", folder_of(tmp_path, strength=schedule), "--output", tmp_path / "core.png", "--points", 5)
    core, values, strength = figures[0].axes
    levels = torch.linspace(0, 1, 5)
    (line,) = strength.get_lines()
    assert line.get_xdata().tolist() == levels.tolist()  # type: ignore[union-attr]
    assert line.get_ydata().tolist() == StrengthSchedule(schedule).at(levels).tolist()  # type: ignore[union-attr]
    assert len(core.get_lines()) == 1
    assert len(values.get_lines()) == 4
    for words in (["--points", 1], ["--output", tmp_path]):
        with pytest.raises(SystemExit, match=r"Use 2 or more|name of a PNG"):
            run("plot", tmp_path, *words)


@pytest.fixture
def pipeline_file(tmp_path: Path) -> Path:
    """A pipeline's file with two components."""
    pipe: Any = small_sd()
    inject_adapter_in_model(nara_config(target_modules=["to_k"]), pipe.unet, "toy")
    config = nara_config(target_modules=["q_proj"], core_type="identity", r=3)
    inject_adapter_in_model(config, pipe.text_encoder, "toy")
    for part in (pipe.unet, pipe.text_encoder):
        disturb(part)
    pipe.save_nara_weights(tmp_path / "toy", adapter_name="toy")
    return tmp_path / "toy"


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_convert_there_and_back_keeps_every_tensor(component: str, pipeline_file: Path, tmp_path: Path) -> None:
    run("convert", pipeline_file, tmp_path / "peft", "--to", "peft", "--component", component)
    run("convert", tmp_path / "peft", tmp_path / "back", "--to", "pipeline", "--component", component)
    expected = load_file(pipeline_file / PIPELINE_WEIGHTS)
    actual = load_file(tmp_path / "back" / PIPELINE_WEIGHTS)
    assert actual.keys() == {key for key in expected if key.startswith(f"{component}.")}
    for key, tensor in actual.items():
        assert torch.equal(tensor, expected[key]), key
    assert (tmp_path / "peft" / CONFIG).is_file()


def test_convert_refuses_ambiguity_and_keeps_existing_files(pipeline_file: Path, tmp_path: Path) -> None:
    run("convert", pipeline_file, tmp_path / "peft", "--to", "peft", "--component", "unet")
    original = (tmp_path / "peft" / WEIGHTS).read_bytes()
    other = ["--to", "peft", "--component", "text_encoder"]
    for words, message in [
        ([pipeline_file, tmp_path / "out", "--to", "peft"], r"text_encoder, unet\. Choose one"),
        ([pipeline_file, tmp_path / "out", "--to", "peft", "--component", "vae"], "Choose one with"),
        ([pipeline_file, tmp_path / "out", "--to", "pipeline"], "or choose --to peft"),
        ([tmp_path / "peft", tmp_path / "out", "--to", "peft"], "or choose --to pipeline"),
        ([tmp_path / "peft", tmp_path / "out", "--to", "pipeline"], "needs --component"),
        ([pipeline_file, tmp_path / "peft", *other], "exists"),
    ]:
        with pytest.raises(SystemExit, match=message):
            run("convert", *words)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "peft" / WEIGHTS).read_bytes() == original
    run("convert", pipeline_file, tmp_path / "peft", *other, "--overwrite")
    assert (tmp_path / "peft" / WEIGHTS).read_bytes() != original


# ---------------------------------------------------------------- a T-LoRA of another project


@pytest.fixture
def lycoris(tmp_path: Path) -> tuple[Path, Path]:
    """A file of LyCORIS with its settings, and a folder with its base."""
    pipe = small_sd()
    pipe.unet.save_pretrained(tmp_path / "base" / "unet")
    return saved(tmp_path / "lycoris", lycoris_file(pipe.unet, NAMES), SETTINGS), tmp_path / "base"


def test_inspect_and_plot_need_no_base_of_tlora(lycoris, tmp_path, capsys) -> None:
    (part,) = inspected(capsys, lycoris[0])["components"].values()
    assert part["method"] == "a T-LoRA of LyCORIS"
    assert part["core"] == {"rank_mask_min": 2, "rank_mask_exponent": 2.0, "rank_mask_step": 2}
    assert part["module_kinds"] == {"to_q": 1, "to_k": 1, "net": 1, "conv_shortcut": 1}
    run("plot", lycoris[0], "--output", tmp_path / "core.png", "--points", 3)
    assert (tmp_path / "core.png").is_file()


def test_convert_writes_a_tlora_as_the_pipeline_does(lycoris, tmp_path) -> None:
    source, base = lycoris
    words = ["--component", "unet", "--base_model", base]
    run("convert", source, tmp_path / "pipeline", "--to", "pipeline", *words)
    run("convert", source, tmp_path / "peft", "--to", "peft", *words)
    pipe: Any = small_sd()
    pipe.load_nara_weights(source)
    pipe.save_nara_weights(tmp_path / "wanted")
    expected = load_file(tmp_path / "wanted" / PIPELINE_WEIGHTS)
    actual = load_file(tmp_path / "pipeline" / PIPELINE_WEIGHTS)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    peft = load_file(tmp_path / "peft" / WEIGHTS)
    torch.testing.assert_close({f"unet.{key.removeprefix('base_model.model.')}": peft[key] for key in peft}, expected)
    run("fold", tmp_path / "pipeline", tmp_path / "lora.safetensors", "--noise_level", "0.5")


def test_convert_and_fold_ask_for_the_base(lycoris, tmp_path) -> None:
    for words in (
        ["convert", lycoris[0], tmp_path / "out", "--to", "peft"],
        ["fold", lycoris[0], tmp_path / "out.safetensors", "--noise_level", "0.5"],
    ):
        with pytest.raises(SystemExit, match=r"lycoris.*--base_model"):
            run(*words)
    assert not list(tmp_path.glob("out*"))


def test_convert_of_the_authors_file_needs_no_base(tmp_path) -> None:
    pipe: Any = small_sd()
    tensors = repository_file(pipe.unet, SDXL)
    source = saved(tmp_path / "file", tensors, SETTINGS)
    run("convert", source, tmp_path / "out", "--to", "pipeline", "--component", "unet")
    actual = load_file(tmp_path / "out" / PIPELINE_WEIGHTS)
    name = "mid_block.attentions.0.transformer_blocks.0.attn2"
    assert torch.equal(
        actual[f"unet.{name}.to_out.0.lora_B.weight"], tensors[f"{name}.processor.to_out_lora.up.weight"]
    )
    assert len(actual) == len(tensors)
