"""Starting a run: what is refused at once, what is written first, where a push goes."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import tracking

from nara_diffusion.training.output import hub
from nara_diffusion.training.output.output_dir import CLAIM
from nara_diffusion.training.run import start_run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"max_train_steps": 0}, "max_train_steps must be at least 1, or none, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"core_learning_rate": -1.0}, "core_learning_rate must be above 0, or none"),
        ({"seed": -1}, "seed must be from 0 to 4294967295, as NumPy's generator takes it, got -1"),
        ({"seed": 2**32}, "seed must be from 0 to 4294967295"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\)"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be above 0, or none"),
        ({"lr_warmup_steps": -1.0}, "lr_warmup_steps must be at least 0"),
        ({"push_to_hub": True, "output_dir": None}, "push_to_hub needs the name of a repository"),
        ({"core_start_step": 5, "core_init": "kaiming"}, "core_start_step trains A and B with C = I first"),
    ],
)
def test_impossible_arguments(small_args, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_args(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr_scheduler": "square"}, "lr_scheduler is 'square', expected one of linear, cosine"),
        ({"report_to": ["wendb"]}, "report_to names 'wendb', which isn't installed here"),
    ],
)
def test_refused_before_anything_is_loaded(small_args, changes: dict, message: str) -> None:
    args = small_args(**changes)
    with pytest.raises(ValueError, match=message):
        start_run(args, "small")
    assert not Path(args.output_dir).exists()


def test_another_runs_folder_is_refused(small_args, tmp_path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    with pytest.raises(ValueError, match=r"already holds another run or other files \(config.yaml\)"):
        start_run(small_args(), "small")


def test_the_configuration_is_saved_when_the_run_opens(small_args) -> None:
    args = small_args(core_hidden_dims=[3])
    with start_run(args, "small") as run:
        assert [path.name for path in Path(args.output_dir).iterdir()] == [CLAIM]
        run.open()
    assert [path.name for path in Path(args.output_dir).iterdir()] == ["config.yaml"]
    saved = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert type(args)(**saved) == args


def test_a_push_uploads_the_folder_without_checkpoints(small_args, monkeypatch) -> None:
    calls = []

    class Api:
        def create_repo(self, name, exist_ok):
            calls.append(("create", name, exist_ok))
            return SimpleNamespace(repo_id=f"me/{name}")

        def upload_folder(self, **arguments):
            calls.append(("upload", arguments))

    monkeypatch.setattr(hub, "HfApi", Api)
    with start_run(small_args(push_to_hub=True), "small") as run:
        assert calls == [("create", "run", True)]  # a missing login shows before anything is loaded or written
        assert [path.name for path in run.folder.iterdir()] == [CLAIM]
        run.open()
        assert run.hub_id == "me/run"
        hub.push_to_hub(run.hub_id, run.folder)
    assert calls[1][1]["repo_id"] == "me/run"
    assert calls[1][1]["folder_path"] == str(run.folder)
    assert {"checkpoint-*/**", CLAIM} < set(calls[1][1]["ignore_patterns"])


@pytest.mark.parametrize("logging_dir", [None, "logs"])
def test_trackers_get_the_folder_the_arguments_and_every_line(small_args, small_run, monkeypatch, logging_dir) -> None:
    made = []

    class Board(tracking.GeneralTracker):
        name = "tensorboard"
        requires_logging_directory = True
        main_process_only = True

        def __init__(self, run_name, logging_dir):
            self.folder, self.config, self.lines = logging_dir, {}, []
            made.append(self)

        @property
        def tracker(self):
            return self

        def store_init_configuration(self, values):
            self.config = values

        def log(self, values, step, **kwargs):
            self.lines.append({"step": step, **values})

    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType.TENSORBOARD])
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Board)
    folder = small_run(small_args(report_to=["tensorboard"], logging_dir=logging_dir)).run.folder
    assert len(made) == 1
    assert made[0].folder == str(folder / "logs" if logging_dir else folder)
    assert (made[0].config["rank"], made[0].config["core_hidden_dims"]) == (3, "5,7")
    assert made[0].lines == [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_optimizer_is_fused_where_no_scaler_tells_skipped_steps_by_their_calls(small_args) -> None:
    run = start_run(small_args(), "small")
    assert run.fuses_optimizer
    run.accelerator.scaler = torch.amp.GradScaler("cpu")
    assert not run.fuses_optimizer
