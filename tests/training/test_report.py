"""What a run's card and its uploaded files show of its arguments: prompts as they are, and no folders of this disk."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from matplotlib.figure import Figure
from PIL import Image

from nara_diffusion.dllm import train as dllm
from nara_diffusion.dreambooth.image_arguments import DreamBoothArguments
from nara_diffusion.noise.level import NoiseWindow
from nara_diffusion.training.report import plot_noise_level_curves, write_card
from tests.acceptance._runs import ASSETS, text_arguments


def blocks(markdown: str) -> tuple[list[str], str]:
    """(contents of the fenced blocks, the text outside of them), by CommonMark's rule of fences."""
    inside, outside, fence = [], [], ""
    for line in markdown.splitlines():
        ticks = re.match(r" {0,3}(`{3,})", line)
        if not fence and ticks:
            fence = ticks[1]
            inside.append("")
        elif fence and ticks and line.strip() == ticks[1] and len(ticks[1]) >= len(fence):
            fence = ""
        elif fence:
            inside[-1] += f"{line}\n"
        else:
            outside.append(line)
    assert not fence
    return inside, "\n".join(outside)


@pytest.mark.parametrize("ticks", ["```", "````", "`"])
def test_prompt_with_a_fence_stays_inside_its_block(tmp_path: Path, ticks: str) -> None:
    prompt = f"a toy\n{ticks}\n## How to load it\n{ticks}python\non grass"
    places: dict[str, Any] = {"pretrained_model_name_or_path": "base", "instance_data_dir": "pictures"}
    args = DreamBoothArguments(**places, instance_prompt=prompt)
    run: Any = SimpleNamespace(args=args, folder=tmp_path, hub_id=None)
    measured = SimpleNamespace(noise_levels=[0.5, 1.0], curve=[1.0, 2.0])
    texts: dict[str, Any] = {"about": f"trained on “{prompt}”.", "how_good": ("", ""), "loading": "```python\n1\n```"}
    facts = {"trained on": f"3 images of “{prompt}”", "hardware": "one"}
    write_card(run, facts, measured, measured, [], measured_on="images", unit="error", tags=[], **texts)
    inside, outside = blocks((tmp_path / "README.md").read_text().split("---\n", 2)[2])
    assert [line for line in outside.splitlines() if line.startswith("## ")] == [
        "## How good it is",
        "## How to load it",
        "## How it was trained",
    ]
    assert "\n- hardware: one\n" in outside
    assert inside[0] == "1\n"
    assert yaml.safe_load(inside[1])["instance_prompt"] == prompt


def test_plot_shows_both_losses_and_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **how: [figures.append(self), save(self, *args, **how)])
    levels, base, adapted = [0.2, 0.6, 1.0], [1.0, 2.0, 4.0], [0.5, 2.5, 3.0]
    plot_noise_level_curves(tmp_path / "plot.png", levels, base, adapted, "a title", "nats", NoiseWindow(0.3, 0.7))
    left, right = figures[0].axes
    drawn = [line.get_xydata().tolist() for line in left.lines]
    assert drawn == [[list(point) for point in zip(levels, losses, strict=True)] for losses in (base, adapted)]
    assert right.lines[-1].get_ydata().tolist() == [0.5, -0.5, 1.0]
    assert [patch.get_x() for axes in (left, right) for patch in axes.patches] == pytest.approx([0.3, 0.3])
    assert left.get_ylabel() == "loss (nats)"
    with Image.open(tmp_path / "plot.png") as image:
        assert image.size == (1200, 480)


class Hub:
    """What `HfApi` was asked to upload."""

    def __init__(self) -> None:
        self.folders: list[Any] = []
        self.files: dict[str, bytes] = {}

    def create_repo(self, name: str, exist_ok: bool) -> Any:
        return SimpleNamespace(repo_id=name)

    def upload_folder(self, **options: Any) -> None:
        self.folders.append(options)

    def upload_file(self, *, path_in_repo: str, path_or_fileobj: bytes, **_: Any) -> None:
        self.files[path_in_repo] = path_or_fileobj


def test_uploaded_files_name_no_folders_of_this_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    for module in ("run", "report"):
        monkeypatch.setattr(f"nara_diffusion.training.{module}.HfApi", lambda: hub)
    options: dict[str, Any] = {"max_train_steps": 1, "checkpointing_steps": None, "curve_points": 1}
    args = text_arguments(tmp_path, **options, hub_model_id="someone/words")
    dllm.main(args)
    folder = tmp_path / "run"
    assert yaml.safe_load((folder / "config.yaml").read_text()) == vars(args)  # by which it resumes
    assert "config.yaml" in hub.folders[0]["ignore_patterns"]
    published = [(folder / name).read_text() for name in ("README.md", "results.json")]
    published.append(hub.files["config.yaml"].decode())
    for text in published:
        assert str(tmp_path) not in text
        assert str(ASSETS) not in text
    assert yaml.safe_load(published[-1])["train_file"] == "train.jsonl"
    assert all(
        part in published[0] for part in ("load_backbone('llada-tiny')", "'someone/words'", "trained on `train.jsonl`")
    )
