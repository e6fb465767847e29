"""The command `nara-check`, from its words to its files."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nara_diffusion.check import cli
from nara_diffusion.check.sources import divide
from nara_diffusion.check.verdict import LIKELY, UNKNOWN, UNLIKELY

from .conftest import LLADA

SHORT = ["--samples", "20", "--steps", "2", "--batch_size", "10", "--repeats", "3", "--rank", "2"]


def checked(folder: Path, *words: str) -> dict[str, Any]:
    cli.main([*words, *SHORT, "--output_dir", str(folder)])
    return json.loads((folder / "check.json").read_text())


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, sdxl_folder: Path, pictures: Path) -> dict[str, Any]:
    """check.json of a model's own prediction, with the "folder" and what was "shown"."""
    folder = tmp_path_factory.mktemp("check") / "out"
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        found = checked(folder, str(sdxl_folder), str(pictures), "--resolution", "16")
    return {**found, "folder": folder, "shown": shown.getvalue()}


def test_check_of_an_image_folder_writes_numbers_and_a_picture(own: dict[str, Any], sdxl_folder: Path) -> None:
    found, shown, folder = own, own["shown"], own["folder"]
    assert found["verdict"] in (LIKELY, UNLIKELY, UNKNOWN)
    assert f"{found['verdict']}: {found['reason']}" in shown
    assert re.search(r"^0\.4 to 0\.5 ", shown, flags=re.MULTILINE)
    assert re.search(r"^all ", shown, flags=re.MULTILINE)
    assert str(folder / "check.json") in shown
    assert {file.name for file in folder.iterdir()} == {"check.json", "check.png"}
    assert (folder / "check.png").read_bytes().startswith(b"\x89PNG")
    assert [row["low"] for row in found["bins"]] == [k / 10 for k in range(10)]
    assert found["repeats"] == 3
    for difference in (found["differences"]["lora"], found["differences"]["untold"]):
        assert difference["low"] <= difference["mean"] <= difference["high"]
    assert found["model"] == str(sdxl_folder)
    assert found["settings"] == {"steps": 2, "samples": 20, "repeats": 3}


def test_check_of_another_prediction_measures_another_loss(
    tmp_path: Path, sdxl_folder: Path, pictures: Path, own: dict[str, Any]
) -> None:
    words = (str(sdxl_folder), str(pictures), "--resolution", "16", "--prediction_type")
    same, v, flow = (checked(tmp_path / kind, *words, kind) for kind in ("epsilon", "v_prediction", "flow_prediction"))
    assert own["bins"] == same["bins"]  # the same seed, to the last bit
    assert len({found["losses"]["base"] for found in (own, v, flow)}) == 3


def test_check_of_records_measures_a_language_model(tmp_path: Path, records: Path) -> None:
    words = (str(LLADA), str(records), "--max_length", "40", "--target_modules", "q_proj,up_proj")
    found, again = (checked(tmp_path / name, *words) for name in ("out", "again"))
    assert found["losses"] == again["losses"]
    assert 0 < found["losses"]["nara"] != found["losses"]["lora"] > 0
    other = checked(tmp_path / "other", *words, "--seed", "1")
    assert other["losses"] != found["losses"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "MODEL and DATA are needed: nara-check MODEL DATA"),
        (["model"], "MODEL and DATA are needed"),
        (["model", "nowhere"], "DATA nowhere doesn't exist: name a folder of images, or a file of records"),
        (["model", "{pictures}", "more"], "takes MODEL and DATA before its flags, got 3"),
        (["model", "{pictures}", "--rank", "0"], "rank is 0, expected at least 1"),
        (["model", "{pictures}", "--samples", "19"], "samples is 19, expected at least 20"),
        (["model", "{pictures}", "--learning_rate", "0"], "learning_rate is 0.0, expected more than 0"),
        (["model", "{pictures}", "--repeats", "2"], "repeats is 2, expected at least 3"),
        (["model", "{pictures}", "--core_learning_rate", "-1"], "core_learning_rate is -1.0, expected more than 0"),
        (["model", "{pictures}", "--resolution", "0"], "resolution is 0, expected at least 1"),
        (["model", "{pictures}", "--seed", "-1"], "seed is -1, expected 0 or more"),
        (["model", "{pictures}", "--device", "cuda:99"], "device 'cuda:99' can't be used: "),
        (["model", "{records}", "--device", "gpu"], "device 'gpu' can't be used: "),
        (["model", "{records}", "--prompt", "a dog"], "prompt: only for images, but DATA"),
        (["{llada}", "{pictures}"], "can't be loaded, since it has no model_index.json"),
        (["{sdxl}", "{empty}"], "{empty}"),
        (["{llada}", "{records}", "--target_modules", "to_q"], "target_modules to_q match no module"),
    ],
)
def test_check_refuses_in_one_line(
    words: list[str],
    expected: str,
    fill: Callable[[str], str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([*map(fill, words), "--output_dir", str(tmp_path / "out")])
    said = str(stop.value.code) if isinstance(stop.value.code, str) else capsys.readouterr().err.splitlines()[-1]
    assert fill(expected) in said
    assert "\n" not in said
    assert not (tmp_path / "out" / "check.json").exists()


def test_check_refuses_an_output_folder_that_is_a_file(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"error: --output_dir .* can't be written"):
        cli.main(["model", str(pictures), "--output_dir", str(tmp_path / "file")])


@pytest.fixture
def fill(tmp_path: Path, sdxl_folder: Path, pictures: Path, records: Path) -> Callable[[str], str]:
    (tmp_path / "empty").mkdir()
    paths = {"sdxl": sdxl_folder, "pictures": pictures, "records": records, "llada": LLADA, "empty": tmp_path / "empty"}
    return lambda word: word.format(**paths) if "{" in word else word


@pytest.mark.parametrize(("count", "trained"), [(9, 9), (10, 8), (23, 18)])
def test_divide_holds_out_a_fifth_where_there_are_enough(count: int, trained: int) -> None:
    training, held_out = divide(range(count))
    assert len(training) == trained
    if count == trained:
        assert list(held_out) == list(training)
    else:
        assert sorted([*training, *held_out]) == list(range(count))


def test_the_help_says_how_it_is_called_and_how_to_read_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    shown = capsys.readouterr().out
    for words in (
        "MODEL DATA [--config",
        "short trainings of LoRA",
        "docs/check.md",
        "--prediction_type",
    ):
        assert words in shown
