"""The command `nara` on the stored files, through the function that is installed under that name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from safetensors.torch import load_file

from nara_diffusion import StrengthSchedule, set_strength
from tests.acceptance import _bases, _files

PEFT, PIPELINES = _files.FILES / "peft", _files.FILES / "pipelines"


def nara(*words: Any) -> None:
    _files.command()([str(word) for word in words])


def inspected(capsys: pytest.CaptureFixture[str], source: Path) -> dict[str, Any]:
    nara("inspect", source, "--json")
    return json.loads(capsys.readouterr().out)


def test_inspect_tells_each_components_layers_ranks_core_and_size(capsys) -> None:
    folder = PIPELINES / "sdxl_float32"
    found, file = inspected(capsys, folder), folder / _files.PIPELINE_WEIGHTS
    assert found["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert found["components"].keys() == {"unet", "text_encoder", "text_encoder_2"}
    part, tensors = found["components"]["unet"], load_file(file)
    own = {key: tensor.numel() for key, tensor in tensors.items() if key.startswith("unet.")}
    assert part["modules"] == len(_files.layers_of(tensors, "unet.")) == sum(part["module_kinds"].values())
    assert (part["ranks"], part["lora_alpha"]) == ([2, 3], 5)
    assert (part["core_type"], part["noise_convention"]) == ("hypernetwork", "timestep")
    core = {key: size for key, size in own.items() if "core" in key and "frequencies" not in key}
    assert part["parameters"]["core"] == sum(core.values())
    assert part["parameters"]["factors"] == sum(size for key, size in own.items() if "lora_" in key)
    assert found["components"]["text_encoder_2"]["core_type"] == "constant"


def test_inspect_tells_strength_and_scheduler(capsys) -> None:
    (part,) = inspected(capsys, PEFT / "strength")["components"].values()
    assert part["strength"] == [[0, 1], [0.5, 0.25], [0.75, 0.75]]
    assert part["base_model"] == "tiny-language"
    (part,) = inspected(capsys, PEFT / "converted")["components"].values()
    assert part["scheduler"]["prediction_type"] == "v_prediction"


@pytest.mark.parametrize("source", [PEFT / "nara_dora", PIPELINES / "flux_bfloat16"], ids=lambda path: path.name)
def test_inspect_without_json_prints_the_same_for_people(source: Path, capsys) -> None:
    (part,) = inspected(capsys, source)["components"].values()
    nara("inspect", source)
    text = capsys.readouterr().out
    for word in (part["method"], part["core_type"], f"{sum(part['parameters'].values()):,}", part["noise_convention"]):
        assert word in text


def test_plot_writes_a_png(tmp_path: Path, capsys) -> None:
    output = tmp_path / "new" / "core.png"
    nara("plot", PEFT / "layer", "--output", output, "--points", 11)
    assert output.read_bytes().startswith(b"\x89PNG\r\n")
    assert str(output) in capsys.readouterr().out
    assert [path.name for path in output.parent.iterdir()] == ["core.png"]


@pytest.mark.filterwarnings("ignore:Could not find a config file in tiny-language:UserWarning")
def test_fold_to_bins_writes_loras_whose_sum_is_the_nara(tmp_path: Path, capsys) -> None:
    nara("fold", PEFT / "knots", tmp_path / "parts", "--bins", 4, "--form", "peft")
    entries = json.loads((tmp_path / "parts" / "lora_bins.json").read_text())["loras"]
    folders = [tmp_path / "parts" / entry["folder"] for entry in entries]
    model = PeftModel.from_pretrained(_bases.language_model(), folders[0], adapter_name="0")
    for index, folder in enumerate(folders[1:], start=1):
        model.load_adapter(str(folder), adapter_name=str(index))
    model.base_model.set_adapter([str(index) for index in range(len(folders))])
    for index, entry in enumerate(entries):
        set_strength(model, str(index), StrengthSchedule(entry["strength"]))
    _files.assert_near(_bases.text_output(model.eval()), _files.expected("peft")["knots"], model)
    error = json.loads((tmp_path / "parts" / "export_error.json").read_text())["worst_update"]
    assert error < 1e-5
    assert "4 LoRAs" in capsys.readouterr().out


def test_fold_to_bins_for_comfyui_has_a_workflow_that_loads_each_file(tmp_path: Path, capsys) -> None:
    nara("fold", PIPELINES / "sdxl_float32", tmp_path / "toys", "--bins", 2, "--form", "kohya", "--base", "sdxl")
    files = {path.name for path in (tmp_path / "toys").glob("*.safetensors")}
    assert len(files) == 3  # two, and the text encoders'
    workflow = json.loads((tmp_path / "toys" / "comfyui_workflow.json").read_text())
    assert files <= {value for node in workflow.values() for value in node["inputs"].values() if isinstance(value, str)}


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "{broken}"],
        ["plot", "{broken}", "--output", "{out}/c.png"],
        ["fold", "{broken}", "{out}/l.safetensors", "--noise_level", "0.5"],
        ["convert", "{broken}", "{out}/peft", "--to", "peft"],
        ["fold", "{good}", "{out}/l.safetensors", "--noise_level", "1.5"],
        ["fold", "{good}", "{out}/l.safetensors", "--noise_level", "0.5", "--form", "kohya"],
        ["fold", "{dora}", "{out}/l.safetensors", "--noise_level", "0.5", "--form", "kohya", "--base", "sdxl"],
        ["convert", "{good}", "{out}/peft", "--to", "peft"],
        ["inspect", "{out}/nowhere"],
    ],
    ids=lambda words: " ".join(words),
)
def test_what_cannot_be_done_ends_in_one_line_and_writes_nothing(words: list[str], tmp_path: Path, capsys) -> None:
    broken, out = tmp_path / _files.PIPELINE_WEIGHTS, tmp_path / "out"
    broken.write_bytes((PIPELINES / "sdxl_float32" / _files.PIPELINE_WEIGHTS).read_bytes()[:-5])
    out.mkdir()
    places = {"broken": broken, "good": PIPELINES / "sdxl_float32", "dora": PIPELINES / "sdxl_unet_float32", "out": out}
    with pytest.raises(SystemExit) as ended:
        nara(*(word.format(**places) for word in words))
    assert isinstance(ended.value.code, str)
    assert ended.value.code.startswith("error: ")
    assert "\n" not in ended.value.code
    assert not [path for path in out.rglob("*") if path.is_file()]
