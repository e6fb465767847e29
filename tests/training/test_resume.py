"""What a resumed run may do otherwise than the run that it continues: be longer, read other data, begin anew."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.optim import SGD
from transformers import get_scheduler

from nara_diffusion.dllm import train as dllm
from nara_diffusion.dllm.text_arguments import Arguments
from nara_diffusion.dreambooth import train as dreambooth
from nara_diffusion.dreambooth.image_arguments import DreamBoothArguments
from nara_diffusion.training.checkpoints import MAY_CHANGE
from tests.acceptance._commands import assert_same_bits, fresh_accelerate, metrics, names
from tests.acceptance._runs import TEXT, image_arguments, image_flags, text_arguments
from tests.helpers.small_pipelines import small_sdxl

SHORT: dict[str, Any] = {"max_train_steps": 2, "checkpointing_steps": 1, "test_samples": 1, "curve_points": 1}
LATEST: dict[str, Any] = {"resume_from_checkpoint": "latest"}


@pytest.fixture(autouse=True)
def _fresh(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.INFO)
    yield
    fresh_accelerate()


def train(folder: Path, **changes: Any) -> Path:
    dllm.main(text_arguments(folder, **SHORT | changes))
    fresh_accelerate()
    return folder / "run"


# ---------------------------------------------------------------- longer


def test_longer_run_at_a_constant_rate_is_one_that_was_never_shorter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    constant = {"lr_scheduler": "constant", "logging_steps": 3}
    (tmp_path / "whole").mkdir()
    whole = train(tmp_path / "whole", **constant, max_train_steps=5)
    run = train(tmp_path, **constant)
    shutil.rmtree(run / "checkpoint-2")  # whose end has logged what the longer run logs at step 3
    caplog.clear()
    train(tmp_path, **constant, **LATEST, max_train_steps=5, checkpointing_steps=2, checkpoints_total_limit=5)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics(run) if line["step"] != 2))
    assert_same_bits(run, whole)
    assert names(run) >= {"checkpoint-1", "checkpoint-2", "checkpoint-4"}
    assert "the schedule now has 5 steps instead of 2" in caplog.messages
    assert any("max_train_steps: 2 there, 5 now" in message for message in caplog.messages)


def test_run_shorter_than_its_interval_of_checkpoints_can_go_on(tmp_path: Path) -> None:
    run = train(tmp_path, checkpointing_steps=500)
    assert "checkpoint-2" in names(run)
    train(tmp_path, **LATEST, checkpointing_steps=500, max_train_steps=3)
    assert metrics(run)[-1]["step"] == 3


def test_longer_run_has_the_rates_of_the_longer_schedule(tmp_path: Path) -> None:
    train(tmp_path)
    run = train(tmp_path, **LATEST, max_train_steps=6)
    optimizer = SGD([{"params": [], "lr": 1e-2}])
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=6)
    rates = []
    for _ in range(6):
        optimizer.step()
        schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert [line["learning_rate"] for line in metrics(run)][2:] == pytest.approx(rates[2:], rel=1e-12)


def test_first_step_of_a_longer_run_is_taken_at_the_longer_schedule_s_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step after the resume, whose rate the checkpoint's optimizer has as the shorter schedule said: 0."""
    train(tmp_path)
    rates: list[float] = []
    prepare = dllm.prepare_training

    def watched(*parts: Any) -> list[Any]:
        prepared = prepare(*parts)
        optimizer = prepared[1].optimizer
        optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
        return prepared

    monkeypatch.setattr(dllm, "prepare_training", watched)
    train(tmp_path, **LATEST, max_train_steps=4)
    assert rates[0] == pytest.approx(0.5e-2)


def test_run_that_would_end_before_its_checkpoint_is_refused(tmp_path: Path) -> None:
    train(tmp_path)
    with pytest.raises(ValueError, match=r"the run ends at step 1, and .*checkpoint-2 is past it"):
        train(tmp_path, **LATEST, max_train_steps=1)


def test_other_data_start_anew_and_other_objectives_are_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = train(tmp_path)
    other = tmp_path / "other.jsonl"
    other.write_text("".join(f'{{"instruction": "say {n}", "output": "{n}"}}\n' for n in range(8)))
    options: dict[str, Any] = LATEST | {"train_file": str(other), "max_train_steps": None, "num_train_epochs": 1}
    train(tmp_path, **options)  # 8 records in steps of 4
    assert f"{run / 'checkpoint-2'} was written with other training data: their order starts anew at step 2" in (
        caplog.messages
    )
    manifest = json.loads((run / "checkpoint-4" / "checkpoint.json").read_text())
    assert (manifest["step"], manifest["total_steps"], manifest["data_start"]) == (4, 4, 2)
    caplog.clear()
    train(tmp_path, **options)
    assert not [message for message in caplog.messages if "order starts anew" in message]
    for name, value in {"seed": 5, "train_batch_size": 2, "max_length": 39, "gen_length": 7, "rank": 4}.items():
        with pytest.raises(ValueError, match=f"another configuration \\({name}: .* there, {value} .*--init_adapter"):
            train(tmp_path, **options, **{name: value})
        fresh_accelerate()


def test_order_of_other_data_is_that_of_a_run_that_begins_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[list[int]]] = []
    loss = dllm.masked_diffusion_loss

    def watched(*parts: Any, **options: Any) -> Any:
        seen[-1] += options["input_ids"].tolist()
        return loss(*parts, **options)

    monkeypatch.setattr(dllm, "masked_diffusion_loss", watched)
    other = tmp_path / "other.jsonl"
    other.write_text("".join(f'{{"instruction": "say {n}", "output": "{n}"}}\n' for n in range(8)))
    (tmp_path / "fresh").mkdir()
    for folder, options in {tmp_path: {}, tmp_path / "fresh": {"train_file": str(other)}}.items():
        seen.append([])
        train(folder, **options)
    seen.append([])
    train(tmp_path, **LATEST, train_file=str(other), max_train_steps=4)
    assert seen[2] == seen[1] != seen[0]
    assert len(seen[2]) == 8


def test_names_that_may_change_are_arguments() -> None:
    known = {field.name for cls in (Arguments, DreamBoothArguments) for field in dataclasses.fields(cls)}
    assert known >= MAY_CHANGE
    kept = {"seed", "adapter", "rank", "learning_rate", "lr_scheduler", "train_batch_size", "global_batch_size"}
    kept |= {"max_length", "gen_length", "trained_padding", "complementary", "min_noise_level", "mixed_precision"}
    kept |= {"resolution", "prediction_type", "snr_gamma", "objective_options", "class_prompt", "prior_loss_weight"}
    assert not kept & MAY_CHANGE


# ---------------------------------------------------------------- anew, or from the one before


def test_latest_begins_in_an_absent_or_empty_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = train(tmp_path, **LATEST, max_train_steps=1)
    assert f"--resume_from_checkpoint latest: {run} holds no checkpoint, so the run starts anew" in caplog.messages
    (tmp_path / "empty" / "run").mkdir(parents=True)
    assert_same_bits(train(tmp_path / "empty", **LATEST, max_train_steps=1), run)


def test_latest_begins_anew_where_the_run_was_killed_before_its_first_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "whole").mkdir()
    whole = train(tmp_path / "whole")

    def killed(run: Any, *parts: Any) -> None:
        run.step = 1
        run.log({"loss": 9.0})
        raise ZeroDivisionError

    monkeypatch.setattr(dllm, "train", killed)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path)
    monkeypatch.undo()
    run = tmp_path / "run"
    (run / ".partial-checkpoint-1").mkdir()
    assert names(run) == {"config.yaml", "metrics.jsonl", ".partial-checkpoint-1"}
    fresh_accelerate()
    with pytest.raises(ValueError, match=r"already holds another run .* --resume_from_checkpoint latest"):
        train(tmp_path)
    fresh_accelerate()
    with pytest.raises(ValueError, match="already holds another run"):
        train(tmp_path, **LATEST, rank=4)
    fresh_accelerate()
    train(tmp_path, **LATEST)
    assert_same_bits(run, whole)
    assert ".partial-checkpoint-1" not in names(run)


def test_latest_refuses_a_folder_of_other_files_and_of_a_run_that_has_ended(tmp_path: Path) -> None:
    run = train(tmp_path, checkpointing_steps=None)
    assert not [name for name in names(run) if "checkpoint" in name]
    before = {path: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(ValueError, match=r"already holds another run .* It has no checkpoint to continue from: name"):
        train(tmp_path, **LATEST, checkpointing_steps=None)
    assert {path: path.read_bytes() for path in run.iterdir()} == before
    (tmp_path / "others" / "run").mkdir(parents=True)
    for name, content in {"thesis.txt": "", "config.yaml": "[rank"}.items():
        (tmp_path / "others" / "run" / name).write_text(content)
        fresh_accelerate()
        with pytest.raises(ValueError, match=r"other files \(thesis.txt\)|while parsing"):
            train(tmp_path / "others", **LATEST)


@pytest.mark.parametrize("damage", ["cut", "missing", "manifest"])
def test_latest_names_a_damaged_checkpoint_and_goes_on_from_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    run = train(tmp_path)
    expected = (run / TEXT).read_bytes()
    broken = run / "checkpoint-2" / ("checkpoint.json" if damage == "manifest" else TEXT)
    if damage == "missing":
        broken.unlink()
    else:
        broken.write_bytes(broken.read_bytes()[:-10])
    train(tmp_path, **LATEST)
    (said,) = [record.message for record in caplog.records if "The one before it is taken" in record.message]
    assert "checkpoint-2" in said
    assert f"goes on from {run / 'checkpoint-1'}" in caplog.messages
    assert (run / TEXT).read_bytes() == expected
    for number in (1, 2):
        (run / f"checkpoint-{number}" / "scheduler.bin").unlink()
    fresh_accelerate()
    caplog.clear()
    named = r"checkpoint-\d .*checkpoint-\d .* start a new run in a fresh --output_dir"
    with pytest.raises(ValueError, match=rf"no checkpoint in .* is whole\. .*{named}"):
        train(tmp_path, **LATEST)
    assert "is taken" not in caplog.text


def test_first_loss_after_a_resume_is_that_of_its_whole_window(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    options: dict[str, Any] = {"max_train_steps": 5, "logging_steps": 3, "checkpoints_total_limit": None}
    whole = train(tmp_path / "whole", **options)
    folder = whole / "checkpoint-2"  # two of three steps into the first window
    assert json.loads((folder / "checkpoint.json").read_text())["unlogged"][1] == 8
    train(tmp_path, **options, resume_from_checkpoint=str(folder))
    assert metrics(tmp_path / "run") == metrics(whole)
    assert [line["step"] for line in metrics(whole)] == [3, 5]


# ---------------------------------------------------------------- images


def test_image_run_goes_on_longer_with_other_prompts_and_intervals(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = image_flags(tmp_path, small_sdxl()) | {"lr_scheduler": "constant", "curve_points": 1}
    longer: dict[str, Any] = {"max_train_steps": 3, "validation_prompts": ["a toy on grass"], "logging_steps": 1}
    for folder, steps in (
        ("run", {"max_train_steps": 2, "checkpointing_steps": 2}),
        ("run", longer),
        ("whole", longer),
    ):
        dreambooth.main(image_arguments(flags, tmp_path / folder, **LATEST, **steps))
        fresh_accelerate()
    assert_same_bits(tmp_path / "run", tmp_path / "whole")
    assert "the schedule now has 3 steps instead of 2" in caplog.messages
