"""The command `nara`: a file alone, without its base model, gives what the adapted model gives; errors are one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from nara_command import COMMANDS, OWN, main
from nara_diffusion import core_matrix, to_lora
from nara_diffusion.cli.plot import core_curves
from nara_diffusion.export.adapter_factors import adapter_of_part
from nara_diffusion.export.to_lora import lora_of
from nara_diffusion.loaders.file import AdapterFile
from tests.acceptance import _bases
from tests.acceptance.test_files_saving import full_disk
from tests.helpers.adapted import TwoLayers, disturb, lora_config, nara_config

LEVEL = 0.37
PREFIX = "base_model.model."
ROOT = Path(__file__).parents[2]
FILES = ROOT / "tests" / "acceptance" / "files"
pytestmark = [
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in (some/base|tiny-language)"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A PEFT folder of TwoLayers."""
    model = get_peft_model(TwoLayers(), nara_config(target_modules=["first", "second"], rank_pattern={"second": 3}))
    disturb(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("name", ["nara_dora", "knots", "bins", "rank_mask", "strength", "layer", "mixed"])
def test_fold_of_a_file_is_that_of_the_adapted_model(name):
    source = FILES / "peft" / name
    base = _bases.mixed_model() if name == "mixed" else _bases.language_model()
    wanted = to_lora(PeftModel.from_pretrained(base, source), LEVEL)
    found = lora_of(adapter_of_part(AdapterFile.read(source).parts["model"]), LEVEL)
    torch.testing.assert_close(found.state_dict(), wanted.state_dict(), rtol=0, atol=0)
    for module, layer in wanted.layers.items():
        assert found.layers[module].scaling == pytest.approx(layer.scaling, rel=1e-12)


def test_fold_counts_the_strength_of_the_file_and_says_so(tmp_path, capsys):
    model = get_peft_model(TwoLayers(), nara_config(target_modules=["first"], strength=[[0.0, 1.0], [0.5, 0.25]]))
    model.peft_config["default"].base_model_name_or_path = "some/base"
    model.save_pretrained(tmp_path / "nara")
    main(["fold", str(tmp_path / "nara"), str(tmp_path / "lora"), "--noise_level", "0.8", "--form", "peft"])
    assert "at its strength of 0.25 there" in capsys.readouterr().out
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base"
    assert config["auto_mapping"]["base_model_class"] == "TwoLayers"


def test_best_fold_is_the_lora_nearest_over_all_levels_and_says_its_error(folder, tmp_path, capsys):
    main(["fold", str(folder), str(tmp_path / "lora"), "--noise_level", "best", "--form", "peft"])
    wanted = lora_of(adapter_of_part(AdapterFile.read(folder).parts["model"]), "best")
    assert f"the largest relative error of ΔW is {wanted.error.worst_update:.2%}" in capsys.readouterr().out
    found = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    with pytest.raises(SystemExit):
        main(["fold", str(folder), str(tmp_path / "lora"), "--noise_level", "bst", "--form", "peft"])
    assert "expected a number in [0, 1], or best, got 'bst'" in capsys.readouterr().err
    key = "first.lora_B.weight"
    torch.testing.assert_close(found[f"{PREFIX}{key}"], wanted.state_dict()[key], rtol=0, atol=0)


def test_inspect_counts_what_is_trained_and_says_that_no_base_is_named(tmp_path, capsys):
    """Frequencies of a Fourier embedding are in the file, and aren't trained."""
    model = get_peft_model(TwoLayers(), nara_config(target_modules=["first"], noise_embedding="fourier"))
    model.save_pretrained(tmp_path)
    main(["inspect", str(tmp_path)])
    said = capsys.readouterr().out
    assert f"{model.get_nb_trainable_parameters()[0]:,}: A and B" in said
    assert "not stored in this file" in said


@pytest.mark.parametrize("changes", [{"core_sharing": "layer"}, {"core_type": "bins", "core_bins": 2}], ids=str)
def test_curves_are_those_of_the_adapted_model(tmp_path, changes):
    model = get_peft_model(TwoLayers(), nara_config(target_modules=["first", "second"], **changes))
    disturb(model)
    model.save_pretrained(tmp_path)
    levels = torch.linspace(0, 1, 7)
    distances, values = core_curves(AdapterFile.read(tmp_path).parts["model"], levels)
    for index, module in enumerate(["first", "second"][: len(distances)]):
        with torch.no_grad():
            C = core_matrix(model, levels, module=module).expand(7, -1, -1).double()
        I = torch.eye(C.shape[-1], dtype=torch.float64)  # noqa: E741
        torch.testing.assert_close(distances[index], (C - I).flatten(1).norm(dim=1) / I.norm(), rtol=1e-6, atol=1e-9)
        grams = torch.linalg.eigvalsh(C.mT @ C).clamp(min=0).sqrt().flip(-1)
        torch.testing.assert_close(values[index], grams, rtol=1e-4, atol=1e-5)


def ended(*words: Any) -> str:
    """The one line in which a command ends."""
    with pytest.raises(SystemExit) as caught:
        main(list(map(str, words)))
    message = str(caught.value)
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{PREFIX}first.lora_B.weight"), "'first' needs A and B, but B is missing"),
        (lambda t: t.update({f"{PREFIX}first.lora_A.weight": torch.zeros(2, 7)}), "A (2, 7) and B (11, 4), expected"),
        (lambda t: t.pop(next(key for key in t if "core" in key)), "its cores don't match its configuration"),
    ],
    ids=["half a layer", "another rank", "half a core"],
)  # fmt: skip
def test_a_damaged_file_ends_in_one_line_and_writes_nothing(change, message, folder, tmp_path):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    for words in (["inspect", folder], ["fold", folder, tmp_path / "out", "--noise_level", "0.5", "--form", "peft"]):
        found = ended(*words)
        assert message in found
        assert str(folder) in found
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_read_or_written_ends_in_one_line(folder, tmp_path):
    lora = tmp_path / "lora"
    get_peft_model(TwoLayers(), lora_config(target_modules=["first"])).save_pretrained(lora)
    (tmp_path / "note.safetensors").write_text("nothing of the kind")
    for path in (tmp_path / "missing", lora, tmp_path / "note.safetensors"):
        assert str(path) in ended("inspect", path)
    weights = folder / "adapter_model.safetensors"
    assert "is the adapter itself" in ended("fold", folder, folder, "--noise_level", "0.5", "--form", "peft")
    assert "names no component" in ended("fold", folder, tmp_path / "x.safetensors", "--noise_level", "0.5")
    assert "is a file" in ended("convert", folder, weights, "--to", "pipeline", "--component", "unet")
    assert "needs --component" in ended("convert", folder, tmp_path / "x", "--to", "pipeline")
    assert "name of a PNG file" in ended("plot", folder, "--output", tmp_path)
    assert "expected one of inspect, plot" in ended("draw", folder)


def test_a_missing_package_ends_in_one_line(tmp_path, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for module in ("backends", "backends.backend_agg", "figure"):
        monkeypatch.delitem(sys.modules, f"matplotlib.{module}", raising=False)
    assert "nara plot needs the package matplotlib" in ended("plot", folder, "--output", tmp_path / "core.png")


WRITES = {
    "convert": ["--to", "pipeline", "--component", "unet"],
    "fold": ["--noise_level", "0.5", "--form", "peft"],
    "fold --bins": ["--bins", "2", "--form", "peft"],
}


@pytest.mark.parametrize(("command", "room"), [*((name, 600) for name in WRITES), ("fold", 1100)])
def test_a_full_or_unwritable_target_ends_in_one_line_with_its_name(command, room, folder, tmp_path):
    """1100 bytes take the LoRA's tensors, and not its configuration. (tests/acceptance has what stays of the files.)"""
    words = [command.split()[0], folder]
    with full_disk(room):
        found = ended(*words, tmp_path / "out", *WRITES[command])
    assert str(tmp_path / "out") in found
    assert "File too large" in found
    assert ".partial" not in found
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
    (tmp_path / "note").write_text("a file where a folder would be")
    assert str(tmp_path / "note") in ended(*words, tmp_path / "note" / "out", *WRITES[command])


def test_a_file_that_safetensors_cannot_write_is_named():
    words = ["/proc/lora.safetensors", "--noise_level", "0.5"]
    found = ended("fold", FILES / "pipelines" / "sdxl_float32", *words)
    assert "'/proc/lora.safetensors' can't be written" in found


# ---------------------------------------------------------------------- help


def test_help_names_every_command_and_imports_none_of_the_libraries():
    """(They take seconds. A process of its own, since this one has imported them.)"""
    program = f"""if True:
        import contextlib, sys
        import nara_command
        for words in [["-h"], ["nonsense"], ["fold", "a", "b"], *([name, "-h"] for name in {list(COMMANDS)})]:
            with contextlib.suppress(SystemExit):
                nara_command.main(words)
        print(sorted({{"torch", "peft", "diffusers", "transformers", "numpy", "nara_diffusion"}} & sys.modules.keys()))
    """
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.splitlines()[-1] == "[]"
    assert "--layers_per_block" in found.stdout
    assert found.stdout.count("usage: nara") == len(OWN)
    help_of_all, of_each = found.stdout.split("usage: nara inspect")
    assert all(f"    nara {command} " in help_of_all for command in COMMANDS)
    assert all(f"nara-{command} " in of_each for command in COMMANDS.keys() - set(OWN))
