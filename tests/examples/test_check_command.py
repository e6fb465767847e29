"""The program nara_check: what it measures on, what it writes, how it continues, and what it refuses."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import nara_check
import pytest
from check.trials import CheckTask

from tests.acceptance._runs import small_llada
from tests.dreambooth.pictures import folder_of
from tests.helpers.small_pipelines import small_sdxl

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
QUESTIONS = ASSETS / "two-step" / "validation.jsonl"


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small SDXL in the working folder, and checks that only return their task."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nara_check, "check_training", lambda task, run: task)
    small_sdxl().save_pretrained("sdxl")


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize(
    ("count", "copies", "flags", "measured", "cheap"),
    [
        (3, 1, [], "Losses on the training pictures under other noise", False),
        (4, 1, [], "Losses on a picture held out", False),
        (3, 0, ["--validation_data_dir", "others"], "Held-out losses", True),
    ],
)
def test_images_are_measured_on_other_pictures_if_possible(
    count: int, copies: int, flags: list[str], measured: str, cheap: bool, monkeypatch: pytest.MonkeyPatch
):
    split, parts = nara_check.split_images, []
    monkeypatch.setattr(nara_check, "split_images", lambda tuning: parts.append(split(tuning)) or parts[0])
    folder_of(Path("pictures"), [(20, 16)] * count)
    folder_of(Path("others"), [(16, 20)] * 2)
    for number in range(copies):
        shutil.copy(f"pictures/0{count - 1}.png", f"pictures/copy-{number}.png")
    class_images = ["--class_data_dir", "toys", "--class_prompt", "a toy"]  # which the check doesn't make
    task: Any = nara_check.check("sdxl", "pictures", ["--resolution", "16", "--rank", "2", *class_images, *flags])
    assert task.measured == measured
    assert ("time" in task.arms) == ("--validation_data_dir" not in task.no_cheap) == cheap
    trained, held_out = ({image.key for image in data.instances} for data in parts[0][:2])
    assert (trained == held_out) == ("training pictures" in measured)
    assert (trained & held_out == set()) == (trained != held_out)
    assert len(trained | held_out) == count + 2 * cheap
    assert not Path("toys").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["images", "text", "canvases"])
def test_program_writes_numbers(kind, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(nara_check, "CheckTask", partial(CheckTask, steps=2, samples=20, repeats=3))
    if kind == "images":
        small_sdxl().save_pretrained(tmp_path / "sdxl")
        words = [str(tmp_path / "sdxl"), str(ASSETS / "subject"), "--resolution", "16"]
        words += ["--validation_data_dir", str(ASSETS / "subject-car")]
    else:
        (tmp_path / "train.jsonl").write_text("\n".join(QUESTIONS.read_text().splitlines()[:24]))
        model = "llada-tiny" if kind == "text" else "gemma-tiny"
        words = [str(ASSETS / model), str(tmp_path / "train.jsonl"), "--target_modules", "q_proj"]
    nara_check.main([*words, "--rank", "2", "--output_dir", str(tmp_path / "out")])
    content = json.loads((tmp_path / "out" / "check.json").read_text())
    assert (content["rank"], content["learning_rate"], content["core_learning_rate"]) == (2, 1e-2, 2.5e-3)
    ways = {"images": ["time"], "text": ["token"], "canvases": []}[kind]
    losses = [content["losses"]["all"][arm] for arm in ("base", "lora", "nara", *ways)]
    assert len(set(losses)) == len(losses)
    assert min(losses) > 0
    assert set(content["differences"]) == {"nara", *ways}
    assert content["cheap_rank"] is None if kind == "canvases" else content["cheap_rank"] > 2
    output = capsys.readouterr().out
    assert f"{content['verdict']}: {content['reason']}" in output
    assert f"{content['measured']}:\n" in output


def test_shipped_model_takes_the_lengths_of_its_run(tmp_path, monkeypatch):
    monkeypatch.setattr(nara_check, "check_training", lambda task, run: task.args)
    args: Any = nara_check.check(str(ASSETS / "llada-tiny"), str(QUESTIONS), ["--output_dir", str(tmp_path / "out")])
    assert (args.gen_length, args.trained_padding) == (12, "gen_length")
    assert nara_check.shipped_lengths(str(ASSETS / "dream-tiny")) == {}


@pytest.mark.slow
def test_stopped_check_continues(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(nara_check, "CheckTask", partial(CheckTask, steps=1, samples=10, repeats=3))
    words = [str(small_llada(tmp_path)), str(QUESTIONS), "--rank", "1", "--target_modules", "q_proj"]
    words += ["--validation_samples", "20", "--gen_length", "12", "--output_dir", str(tmp_path / "out")]
    nara_check.main(words)
    complete = (tmp_path / "out" / "check.json").read_text()
    (tmp_path / "out" / "check.json").unlink()
    lines = (tmp_path / "out" / "repeats.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 3
    (tmp_path / "out" / "repeats.jsonl").write_text(lines[0] + lines[1] + lines[2][:50])  # killed while writing
    nara_check.main(words)
    assert (tmp_path / "out" / "repeats.jsonl").read_text() == "".join(lines)
    assert (tmp_path / "out" / "check.json").read_text() == complete
    capsys.readouterr()
    with pytest.raises(SystemExit, match="already holds another run"):
        nara_check.main([*words, "--learning_rate", "0.1"])
    with pytest.raises(SystemExit, match=r"repeats\.jsonl was measured on other data"):
        nara_check.main([*words, "--validation_samples", "30"])


def test_program_refuses_in_one_line(capsys):
    text = [str(ASSETS / "llada-tiny"), __file__]
    for words, message in [
        ([], "takes MODEL and DATA before its flags, got 0"),
        (["model", "nowhere"], "DATA nowhere doesn't exist"),
        (["model", str(ASSETS), "more"], "takes MODEL and DATA before its flags, got 3"),
        ([*text, "--rank", "0"], "rank must be at least 1, got 0"),
        ([*text, "--adapter", "full"], "low-rank adapters, got --adapter full"),
        ([*text, "--resume_from_checkpoint", "latest"], "leave --resume_from_checkpoint out"),
    ]:
        with pytest.raises(SystemExit) as stop:
            nara_check.main(words)
        output = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err.splitlines()[-1]
        assert message in output
