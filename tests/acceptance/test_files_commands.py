"""The command `nara` on the stored files, by the function that is installed under that name; errors are one line."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from nara_command import COMMANDS, OWN
from tests.acceptance import _bases, _files
from tests.acceptance._files import nara
from tests.acceptance.test_files_refused import broken

PEFT, PIPELINES, EXPORTS = (_files.FILES / kind for kind in ("peft", "pipelines", "exports"))


def inspected(capsys: pytest.CaptureFixture[str], source: Path) -> dict[str, Any]:
    nara("inspect", source, "--json")
    return json.loads(capsys.readouterr().out)


def test_inspect_json_lists_layers_ranks_core_and_size(capsys) -> None:
    folder = PIPELINES / "sdxl_float32"
    facts, file = inspected(capsys, folder), folder / _files.PIPELINE_WEIGHTS
    assert facts["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert facts["components"].keys() == {"unet", "text_encoder", "text_encoder_2"}
    part, tensors = facts["components"]["unet"], load_file(file)
    sizes = {key: tensor.numel() for key, tensor in tensors.items() if key.startswith("unet.")}
    assert part["modules"] == len(_files.layers_of(tensors, "unet.")) == sum(part["module_kinds"].values())
    assert (part["ranks"], part["lora_alpha"]) == ([2, 3], 5)
    assert (part["core_type"], part["noise_convention"]) == ("hypernetwork", "timestep")
    core = {key: size for key, size in sizes.items() if "core" in key and "frequencies" not in key}
    assert part["parameters"]["core"] == sum(core.values())
    assert part["parameters"]["factors"] == sum(size for key, size in sizes.items() if "lora_" in key)
    assert facts["components"]["text_encoder_2"]["core_type"] == "constant"


def test_inspect_prints_strength_in_json_and_text(capsys) -> None:
    (part,) = inspected(capsys, PEFT / "strength")["components"].values()
    assert part["strength"] == [[0, 1], [0.5, 0.25], [0.75, 0.75]]
    assert part["base_model"] == "tiny-language"
    for source in (PEFT / "nara_dora", PIPELINES / "flux_bfloat16"):
        (part,) = inspected(capsys, source)["components"].values()
        nara("inspect", source)
        text, size = capsys.readouterr().out, sum(part["parameters"].values())
        for word in (part["method"], part["core_type"], f"{size:,}: A and B", part["noise_convention"]):
            assert word in text
        assert ("not stored in this file" in text) is (part["base_model"] is None)


def test_inspect_names_the_base_but_no_local_folder(tmp_path: Path, capsys) -> None:
    for base, printed in (("me/base", "me/base"), (tmp_path, tmp_path.name)):
        pipe = _bases.sdxl()
        pipe.load_nara_weights(PIPELINES / "sdxl_float32")
        pipe.register_to_config(_name_or_path=str(base))
        pipe.save_nara_weights(tmp_path / "saved")
        assert {part["base_model"] for part in inspected(capsys, tmp_path / "saved")["components"].values()} == {
            printed
        }
    nara("convert", tmp_path / "saved", tmp_path / "peft", "--to", "peft", "--component", "unet")
    capsys.readouterr()
    nara("convert", tmp_path / "peft", tmp_path / "back", "--to", "pipeline", "--component", "unet")
    capsys.readouterr()
    assert inspected(capsys, tmp_path / "back")["components"]["unet"]["base_model"] == tmp_path.name


def test_plot_writes_a_png(tmp_path: Path, capsys) -> None:
    output = tmp_path / "new" / "core.png"
    nara("plot", PEFT / "layer", "--output", output, "--points", 11)
    assert output.read_bytes().startswith(b"\x89PNG\r\n")
    assert str(output) in capsys.readouterr().out
    assert [path.name for path in output.parent.iterdir()] == ["core.png"]


# ---------------------------------------------------------------------- errors

ONE = ["--noise_level", "0.5"]
REFUSED: list[tuple[list[str], str]] = [
    (["inspect", "{out}/nowhere"], "{out}/nowhere"),
    (["inspect", "{lora}"], "{lora}"),
    (["inspect", "{note}"], "{note}"),
    (["inspect", "{cut}"], "{cut}"),
    (["plot", "{cut}", "--output", "{out}/c.png"], "{cut}"),
    (["plot", "{peft}", "--output", "{out}"], "name of a PNG file"),
    (["fold", "{cut}", "{out}/l.safetensors", *ONE], "{cut}"),
    (["fold", "{pipeline}", "{out}/l.safetensors", "--noise_level", "1.5"], "1.5"),
    (["fold", "{pipeline}", "{out}/l.safetensors", *ONE, "--form", "kohya"], "needs --base"),
    (["fold", "{dora}", "{out}/l.safetensors", *ONE, "--form", "kohya", "--base", "sdxl"], "is a DoRA"),
    (["fold", "{peft}", "{peft}", *ONE, "--form", "peft"], "is the adapter itself"),
    (["fold", "{peft}", "{out}/l.safetensors", *ONE], "names no component"),
    (["fold", "{pipeline}", "/proc/l.safetensors", *ONE], "'/proc/l.safetensors' can't be written"),
    (["convert", "{cut}", "{out}/peft", "--to", "peft"], "{cut}"),
    (["convert", "{pipeline}", "{out}/peft", "--to", "peft"], "with --component"),
    (["convert", "{peft}", "{note}", "--to", "pipeline", "--component", "unet"], "exists: '{note}'"),
    (["convert", "{peft}", "{out}/x", "--to", "pipeline"], "needs --component"),
    (["draw", "{peft}"], "expected one of inspect, plot"),
    (["inspect", "{half}"], "{half}' can't be loaded: The checkpoint lacks 'model.layers.0.mlp.down_proj.lora_B"),
    (
        ["fold", "{half}", "{out}/lora", *ONE, "--form", "peft"],
        "{half}' can't be loaded: The checkpoint lacks 'model.layers.0",
    ),
    (
        ["fold", "{rank}", "{out}/lora", *ONE, "--form", "peft"],
        "has shape (4, 24) in the checkpoint, but this adapter needs (3, 24)",
    ),
    (["inspect", "{core}"], "{core}' can't be loaded: The checkpoint lacks 'nara_core.shared.layers.1.weight'"),
    (
        ["fold", "{core}", "{out}/lora", *ONE, "--form", "peft"],
        "{core}' can't be loaded: The checkpoint lacks 'nara_core.",
    ),
]


def ended(*words: Any) -> str:
    """The one line in which a command ends."""
    with pytest.raises(SystemExit) as caught:
        nara(*words)
    message = str(caught.value)
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


def test_impossible_commands_end_in_one_line_writing_nothing(tmp_path: Path) -> None:
    places = {"peft": PEFT / "nara", "pipeline": PIPELINES / "sdxl_float32", "dora": PIPELINES / "sdxl_unet_float32"}
    places |= {"lora": EXPORTS / "nara_peft", "out": tmp_path / "out", "note": tmp_path / "note.safetensors"}
    places |= {name: tmp_path / name for name in ("cut", "half", "rank", "core")}
    broken("cut off", "pipeline", places["cut"])
    broken("B of a layer missing", "peft", places["half"])
    broken("A of another rank", "peft", places["rank"])
    broken("one tensor of the core missing", "peft", places["core"])
    places["out"].mkdir()
    places["note"].write_text("nothing of the kind")
    for words, message in REFUSED:
        assert message.format(**places) in ended(*(word.format(**places) for word in words))
        assert not list(places["out"].rglob("*"))


def test_a_missing_package_ends_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for module in ("backends", "backends.backend_agg", "figure"):
        monkeypatch.delitem(sys.modules, f"matplotlib.{module}", raising=False)
    assert "nara plot needs the package matplotlib: pip install 'nara-diffusion[" in ended(
        "plot", PEFT / "nara", "--output", tmp_path / "core.png"
    )


def test_help_lists_every_command_without_importing_libraries():
    """(They take seconds. A process of its own, since this one has imported them.)"""
    program = f"""if True:
        import contextlib, sys
        import nara_command
        for words in [["-h"], ["nonsense"], ["fold", "a", "b"], *([name, "-h"] for name in {list(COMMANDS)})]:
            with contextlib.suppress(SystemExit):
                nara_command.main(words)
        print(sorted({{"torch", "peft", "diffusers", "transformers", "numpy", "nara_diffusion"}} & sys.modules.keys()))
    """
    process = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=_files.ROOT
    )
    assert process.stdout.splitlines()[-1] == "[]"
    assert "--noise_level" in process.stdout
    assert process.stdout.count("usage: nara") == len(OWN)
    help_of_all, of_each = process.stdout.split("usage: nara inspect")
    assert all(f"    nara {command} " in help_of_all for command in COMMANDS)
    assert all(f"nara-{command} " in of_each for command in COMMANDS.keys() - set(OWN))
