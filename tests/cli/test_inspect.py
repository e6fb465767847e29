"""`nara inspect`: what it says of files that were written by the three ways of saving, counted by hand."""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import get_peft_model
from safetensors.torch import load_file, save_file

import nara_diffusion  # noqa: F401
from nara_diffusion import StrengthSchedule
from nara_diffusion.cli.main import COMMANDS, main
from tests.helpers.adapted import TwoLayers, disturb, lora_config, nara_config
from tests.helpers.small_pipelines import small_sdxl

BASE = str(Path(__file__).parents[2] / "examples" / "assets" / "llada-tiny")


@pytest.fixture
def peft_folder(tmp_path):
    model = get_peft_model(TwoLayers(), nara_config(target_modules=["first", "second"], rank_pattern={"second": 3}))
    disturb(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def inspected(capsys, *words):
    main(["inspect", *map(str, words), "--json"])
    return json.loads(capsys.readouterr().out)


def test_inspect_counts_modules_ranks_and_parameters_of_a_peft_folder(peft_folder, capsys):
    found = inspected(capsys, peft_folder)
    weights = peft_folder / "adapter_model.safetensors"
    assert found["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert found["bytes"] == weights.stat().st_size
    part = found["components"]["model"]
    assert part["ranks"] == [3, 4]
    assert part["module_kinds"] == {"first": 1, "second": 1}
    factors = 4 * 7 + 11 * 4 + 3 * 11 + 5 * 3
    core = 8 // 2 + (8 + 1) * 9 + (9 + 1) * 10 + (10 + 1) * 16  # frequencies, and three layers with biases
    assert part["parameters"] == {"factors": factors, "core": core}
    assert part["core"]["core_scale"] == 0.7
    assert part["method"] == "NaRA"


def test_inspect_names_every_component_and_the_convention_of_a_pipelines_file(tmp_path, capsys):
    pipe = small_sdxl()
    pipe.unet.add_adapter(nara_config(target_modules=["to_q", "to_k"], use_dora=True), "toy")
    pipe.save_nara_weights(tmp_path, adapter_name="toy")
    part = inspected(capsys, tmp_path)["components"]["unet"]
    wanted = sum(name.endswith(("to_q", "to_k")) for name, _ in small_sdxl().unet.named_modules())
    assert isinstance(pipe.unet, UNet2DConditionModel)
    assert part["modules"] == wanted > 0
    assert part["method"] == "NaRA-DoRA"
    assert part["noise_convention"] == pipe.unet.peft_config["toy"].noise_convention is not None
    assert part["dtypes"] == ["float32"]


def test_inspect_names_the_base_model_of_a_peft_folder(tmp_path, capsys):
    model = get_peft_model(TwoLayers(), nara_config(target_modules=["first"]))
    model.peft_config["default"].base_model_name_or_path = BASE
    model.save_pretrained(tmp_path)
    main(["inspect", str(tmp_path)])
    assert f"base model  {BASE}\n" in capsys.readouterr().out
    assert inspected(capsys, tmp_path / "adapter_model.safetensors")["components"]["model"]["base_model"] == BASE


def test_trained_biases_are_no_modules(tmp_path, capsys):
    get_peft_model(TwoLayers(), nara_config(target_modules=["first"], bias="all")).save_pretrained(tmp_path)
    assert inspected(capsys, tmp_path)["components"]["model"]["module_kinds"] == {"first": 1}


def test_inspect_prints_lines_that_people_read(peft_folder, capsys):
    main(["inspect", str(peft_folder)])
    printed = capsys.readouterr().out
    assert "model: NaRA\n" in printed
    assert "modules     2: 1 first, 1 second\n" in printed
    assert "rank        3, 4; lora_alpha 6\n" in printed
    assert "core        hypernetwork: core_scale 0.7, core_hidden_dims (9, 10)" in printed


def test_inspect_shows_a_strength_over_noise(tmp_path, capsys):
    config = nara_config(target_modules=["first"], strength=StrengthSchedule([(0, 1.0), (0.5, 0.25)]))
    get_peft_model(TwoLayers(), config).save_pretrained(tmp_path)
    main(["inspect", str(tmp_path)])
    assert "strength    over λ: [[0.0, 1.0], [0.5, 0.25]]\n" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["nothing", "lora", "cut", "text"])
def test_bad_file_ends_in_one_line(tmp_path, peft_folder, what, capsys):
    path = tmp_path / "missing"
    if what == "lora":
        path = tmp_path / "lora"
        get_peft_model(TwoLayers(), lora_config(target_modules=["first"])).save_pretrained(path)
    if what == "cut":
        path = peft_folder
        file = path / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-10])
    if what == "text":
        path = tmp_path / "note.safetensors"
        path.write_text("nothing of the kind")
    with pytest.raises(SystemExit) as caught:
        main(["inspect", str(path)])
    message = str(caught.value)
    assert message.startswith("error: ")
    assert "\n" not in message
    assert str(path) in message


def damaged(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


PREFIX = "base_model.model."


@pytest.mark.parametrize("words", [["inspect"], ["fold", "out", "--noise_level", "0.5", "--form", "peft"]])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop(f"{PREFIX}first.lora_B.weight"),
            r"'first' in model needs A and B, but lora_B\.weight is missing",
        ),
        (
            lambda t: t.update({f"{PREFIX}first.lora_A.weight": torch.zeros(2, 7)}),
            r"'first' in model has A \(2, 7\) and B \(11, 4\), expected rank 4",
        ),
        (
            lambda t: t.update({f"{PREFIX}first.lora_A.weight": torch.zeros(4)}),
            r"'first' in model has A \(4,\) and B \(11, 4\), expected rank 4",
        ),
    ],
    ids=["half a layer", "another rank", "a vector"],
)
def test_damaged_factors_end_in_one_line(tmp_path, peft_folder, words, change, message):
    damaged(peft_folder, change)
    command, *others = words
    if others:
        others[0] = str(tmp_path / others[0])
    with pytest.raises(SystemExit, match=f"error: .*{message}") as caught:
        main([command, str(peft_folder), *others])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_damaged_core_ends_in_one_line(tmp_path, peft_folder):
    damaged(peft_folder, lambda tensors: tensors.pop(next(key for key in tensors if "nara_core" in key)))
    with pytest.raises(SystemExit, match="error: its cores don't match its configuration") as caught:
        main(["plot", str(peft_folder), "--output", str(tmp_path / "core.png")])
    assert "\n" not in str(caught.value)


def test_a_missing_package_ends_in_one_line(tmp_path, peft_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for module in ("backends", "backends.backend_agg", "figure"):
        monkeypatch.delitem(sys.modules, f"matplotlib.{module}", raising=False)
    message = r"nara plot needs the package matplotlib: pip install -e '\.\[train,eval\]', in a clone of the project$"
    with pytest.raises(SystemExit, match=message):
        main(["plot", str(peft_folder), "--output", str(tmp_path / "core.png")])
    assert not (tmp_path / "core.png").exists()


def test_unknown_command_names_the_known_ones():
    with pytest.raises(SystemExit, match="has no command 'inspekt', expected one of inspect, plot, fold, convert"):
        main(["inspekt"])


def test_help_names_every_command(capsys):
    main([])
    printed = capsys.readouterr().out
    assert all(f"nara {command} " in printed for command in COMMANDS)


@pytest.mark.parametrize("command", ["inspect", "plot", "fold", "convert", "check", "metrics"])
def test_help_of_a_command_teaches(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"usage: nara {command} " in capsys.readouterr().out
