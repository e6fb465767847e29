"""The command nara-check: what it measures on, what it writes, and what it refuses."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nara_diffusion.check import check_tasks
from nara_diffusion.check.check_tasks import check_images, main
from nara_diffusion.check.trials import CheckTask
from tests.dreambooth.pictures import folder_of
from tests.helpers.small_pipelines import small_sdxl

ASSETS = Path(__file__).parents[2] / "examples" / "assets"


@pytest.mark.parametrize(
    ("count", "copies", "flags", "measured", "cheap"),
    [
        (3, 1, [], "Losses on the training pictures under other noise", False),
        (3, 0, ["--validation_data_dir", "others"], "Held-out losses", True),
    ],
)
def test_check_of_images_says_what_it_measures_on_and_compares_layers_on_others_only(
    count: int,
    copies: int,
    flags: list[str],
    measured: str,
    cheap: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(check_tasks, "check_training", lambda task, run: task)
    monkeypatch.setattr(check_tasks, "check_images", lambda tuning: (tuning, check_images(tuning)))
    small_sdxl().save_pretrained("sdxl")
    folder_of(tmp_path / "pictures", [(20, 16)] * count)
    folder_of(tmp_path / "others", [(16, 20)] * 2)
    for number in range(copies):
        shutil.copy(f"pictures/0{count - 1}.png", f"pictures/copy-{number}.png")
    found: Any = check_tasks.check("sdxl", "pictures", ["--resolution", "16", "--rank", "2", *flags])
    tuning, task = found
    assert task.measured == measured
    assert ("time" in task.arms) == ("--validation_data_dir" not in task.no_cheap) == cheap
    trained, held_out = ({image.key for image in data.instances} for data in (tuning.dataset, tuning.measured_on))
    assert (trained == held_out) == ("training pictures" in measured)
    assert (trained & held_out == set()) == (trained != held_out)
    assert len(trained | held_out) == count + 2 * cheap


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["images", "text", "canvases"])
def test_command_writes_numbers(kind, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(check_tasks, "CheckTask", partial(CheckTask, steps=2, samples=20, repeats=3))
    if kind == "images":
        small_sdxl().save_pretrained(tmp_path / "sdxl")
        words = [str(tmp_path / "sdxl"), str(ASSETS / "subject"), "--resolution", "16"]
        words += ["--validation_data_dir", str(ASSETS / "subject-car")]
    else:
        lines = (ASSETS / "two-step" / "validation.jsonl").read_text().splitlines()[:24]
        (tmp_path / "train.jsonl").write_text("\n".join(lines))
        model, answer = ("llada-tiny", "12") if kind == "text" else ("gemma-tiny", "16")
        words = [str(ASSETS / model), str(tmp_path / "train.jsonl"), "--max_length", "60", "--gen_length", answer]
        words += ["--target_modules", "q_proj"]
    main([*words, "--rank", "2", "--output_dir", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "check.json").read_text())
    assert (found["rank"], found["learning_rate"], found["core_learning_rate"]) == (2, 1e-2, 2.5e-3)
    ways = {"images": ["time"], "text": ["token"], "canvases": []}[kind]
    losses = [found["losses"]["all"][arm] for arm in ("base", "lora", "nara", *ways)]
    assert len(set(losses)) == len(losses)
    assert min(losses) > 0
    assert set(found["differences"]) == {"nara", *ways}
    assert found["cheap_rank"] is None if kind == "canvases" else found["cheap_rank"] > 2
    shown = capsys.readouterr().out
    assert f"{found['verdict']}: {found['reason']}" in shown
    assert f"{found['measured']}:\n" in shown
