"""What a resumed run may do otherwise than the run that it continues: be longer, read other data, begin anew; and
--init_adapter, by which a run begins where a file ends, and refuses one that its flags don't describe."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.optim import SGD
from transformers import get_scheduler

from nara_diffusion.dllm import masked_diffusion_loss
from nara_diffusion.dllm import train as dllm
from nara_diffusion.dllm.kinds.masked_kind import MASKED
from nara_diffusion.dllm.text_arguments import Arguments
from nara_diffusion.dreambooth.denoiser import AdaptedDenoiser
from nara_diffusion.dreambooth.image_arguments import DreamBoothArguments
from nara_diffusion.dreambooth.train import main
from nara_diffusion.loaders.file import AdapterFile
from nara_diffusion.training.adapter_weights import start_from
from nara_diffusion.training.adapters import adapter_config
from nara_diffusion.training.arguments import schedule_of
from nara_diffusion.training.checkpoints import read_manifest, write_manifest
from nara_diffusion.training.run_folder import MAY_CHANGE, changed_arguments
from tests.acceptance._commands import assert_same_bits, metrics, names
from tests.acceptance._runs import IMAGES, TEXT, image_arguments, image_flags, text_arguments
from tests.helpers.small_pipelines import small_sdxl

SHORT: dict[str, Any] = {"max_train_steps": 2, "checkpointing_steps": 1, "test_samples": 1, "curve_points": 1}
SHORT |= {"logging_steps": 2}  # a checkpoint of step 1 has a loss that isn't logged yet
LATEST: dict[str, Any] = {"resume_from_checkpoint": "latest"}


@pytest.fixture(autouse=True)
def _facts(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def train(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    dllm.main(text_arguments(folder, **SHORT | changes))
    return folder / "run"


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps at a falling rate, with a checkpoint of each."""
    return train(tmp_path_factory.mktemp("ended"))


def resumed(ended: Path, folder: Path, **changes: Any) -> Path:
    """A copy of it that goes on."""
    shutil.copytree(ended.parent, folder, dirs_exist_ok=True)
    return train(folder, **LATEST | changes)


# ---------------------------------------------------------------- longer


def test_longer_run_follows_the_longer_schedule(
    ended: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one too, whose rate the checkpoint's optimizer has as the shorter schedule said: 0. (At a constant rate
    it is to the bits one that was never shorter: tests/acceptance/test_script_engines.py.)"""
    rates: list[float] = []
    prepare = dllm.prepare_training

    def watched(*parts: Any) -> list[Any]:
        prepared = prepare(*parts)
        optimizer = prepared[1].optimizer
        optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
        return prepared

    monkeypatch.setattr(dllm, "prepare_training", watched)
    run = resumed(ended, tmp_path, max_train_steps=4, checkpointing_steps=2, checkpoints_total_limit=5)
    optimizer = SGD([{"params": [], "lr": 1e-2}])
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=4)
    expected = [1e-2]
    for _ in range(4):
        optimizer.step()
        schedule.step()
        expected.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx(expected[2:4], rel=1e-12)
    assert metrics(run)[-1]["learning_rate"] == pytest.approx(expected[4], abs=1e-18)
    assert names(run) >= {"checkpoint-1", "checkpoint-2", "checkpoint-4"}
    assert "the schedule now has 4 steps instead of 2" in caplog.messages
    assert any("max_train_steps: 2 there, 4 now" in message for message in caplog.messages)


def test_core_starts_after_core_start_step_steps(tmp_path: Path) -> None:
    run = train(tmp_path, core_start_step=1)
    first, second = (load_file(run / f"checkpoint-{step}" / TEXT) for step in (1, 2))
    last = max(name for name in first if "nara_core" in name and name.endswith("weight"))
    assert not first[last].any()
    assert second[last].any()


def test_run_ending_before_its_checkpoint_is_refused(ended: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ends at step 1, but .*checkpoint-2 is past it"):
        resumed(ended, tmp_path, max_train_steps=1)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    write_manifest(checkpoint, read_manifest(checkpoint) | {"processes": 2})
    with pytest.raises(ValueError, match="was written by 2 processes, but this run has 1"):
        train(tmp_path, **LATEST)


def test_other_data_start_in_a_fresh_order(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the end of a run that is shorter than its interval of checkpoints."""
    seen: list[list[int]] = []

    def watched(*parts: Any, **options: Any) -> Any:
        if "window" in options:  # in training, not in validation
            seen.extend(options["input_ids"].tolist())
        return masked_diffusion_loss(*parts, **options)

    other = tmp_path / "other.jsonl"
    other.write_text("".join(f'{{"instruction": "say {n}", "output": "{n}"}}\n' for n in range(8)))
    options: dict[str, Any] = {"train_file": str(other), "checkpointing_steps": 500}
    run = train(tmp_path, checkpointing_steps=500)
    monkeypatch.setattr(
        "nara_diffusion.dllm.text_data.kind_of", lambda backbone, flags=None: replace(MASKED, loss=watched)
    )
    train(tmp_path / "fresh", **options)
    options |= LATEST | {"max_train_steps": None, "num_train_epochs": 1}
    train(tmp_path, **options)  # 8 records in steps of 4
    assert seen[:8] == seen[8:]
    message = f"{run / 'checkpoint-2'} was written with other training data, so their order starts again at step 2"
    assert caplog.messages.count(message) == 1
    manifest = json.loads((run / "checkpoint-4" / "checkpoint.json").read_text())
    assert (manifest["step"], manifest["total_steps"], manifest["data_start"]) == (4, 4, 2)
    train(tmp_path, **options)
    assert caplog.text.count("order starts again") == 1


def test_changeable_names_are_arguments_that_train_nothing() -> None:
    arguments = {field.name for cls in (Arguments, DreamBoothArguments) for field in dataclasses.fields(cls)}
    assert arguments >= MAY_CHANGE
    data = {name for name in arguments if name.endswith(("_data_dir", "_source_dir"))}
    assert data <= MAY_CHANGE  # digests notice other images
    training_names = {
        "seed",
        "adapter",
        "rank",
        "learning_rate",
        "lr_scheduler",
        "train_batch_size",
        "global_batch_size",
    }
    training_names |= {
        "max_length",
        "gen_length",
        "trained_padding",
        "complementary",
        "min_noise_level",
        "mixed_precision",
    }
    training_names |= {"group_by_length"}
    training_names |= {
        "resolution",
        "weighting_scheme",
        "snr_gamma",
        "noise_offset",
        "class_prompt",
        "prior_loss_weight",
    }
    assert not training_names & MAY_CHANGE


def test_arguments_of_an_earlier_version_are_compared(tmp_path: Path) -> None:
    args = text_arguments(tmp_path, temperature=0.5)
    new = {"train_on_encoder", "temperature", "curve_points", "revision"}
    saved: dict[str, Any] = {name: value for name, value in vars(args).items() if name not in new}
    saved |= {"check": False, "model_options": {}, "evaluation_options": {"temperature": 0.5, "curve_points": 2}}
    assert changed_arguments(args, saved) == {}
    ungrouped = {name: value for name, value in saved.items() if name != "group_by_length"}
    assert changed_arguments(args, ungrouped) == {"group_by_length": (False, True)}
    saved |= {"model_options": {"train_on_encoder": False, "revision": "v1"}, "gone": 3}
    expected = {"train_on_encoder": (False, True), "revision": ("v1", None), "gone": (3, None)}
    assert changed_arguments(args, saved) == expected


def test_logged_loss_is_the_mean_since_the_last(ended: Path, tmp_path: Path) -> None:
    first, second = [line["loss"] for line in metrics(train(tmp_path, logging_steps=1)) if "loss" in line]
    (both,) = [line["loss"] for line in metrics(ended) if "loss" in line]
    assert first != second
    assert both == pytest.approx((first + second) / 2, rel=1e-6)


# ---------------------------------------------------------------- anew, or from the one before


@pytest.mark.slow
def test_latest_begins_anew_without_a_checkpoint(
    ended: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(tmp_path, **LATEST)
    assert f"{run} has no checkpoint, so the run starts from the beginning" in caplog.text
    assert_same_bits(run, ended)
    shutil.rmtree(run)

    def killed(run: Any, *parts: Any) -> None:
        run.step = 1
        run.log({"loss": 9.0})
        raise ZeroDivisionError

    monkeypatch.setattr(dllm, "train", killed)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path)
    monkeypatch.undo()
    (run / ".partial-checkpoint-1").mkdir()
    assert names(run) == {"config.yaml", "metrics.jsonl", ".partial-checkpoint-1"}
    for changes in ({}, LATEST | {"rank": 4}):
        with pytest.raises(ValueError, match=r"already holds another run"):
            train(tmp_path, **changes)
    train(tmp_path, **LATEST)
    assert_same_bits(run, ended)
    assert ".partial-checkpoint-1" not in names(run)


def test_latest_refuses_other_files_and_ended_runs(ended: Path, tmp_path: Path) -> None:
    run = train(tmp_path, checkpointing_steps=None)
    assert not [name for name in names(run) if "checkpoint" in name]
    files = {path: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(ValueError, match=r"already holds another run .* It has no checkpoint to continue from: give"):
        train(tmp_path, **LATEST, checkpointing_steps=None)
    with pytest.raises(ValueError, match="already holds another run"):
        train(tmp_path, resume_from_checkpoint=str(ended / "checkpoint-1"))
    assert {path: path.read_bytes() for path in run.iterdir()} == files
    (tmp_path / "others" / "run").mkdir(parents=True)
    for name, content in {"thesis.txt": "", "config.yaml": "[rank"}.items():
        (tmp_path / "others" / "run" / name).write_text(content)
        with pytest.raises(ValueError, match=r"other files \(thesis.txt\)|while parsing"):
            train(tmp_path / "others", **LATEST)


@pytest.mark.parametrize("damage", ["zeros", "missing", "manifest"])
def test_latest_skips_a_damaged_checkpoint(
    ended: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    """To the same bits, in the log too, where a line is left half-written."""
    run = Path(shutil.copytree(ended, tmp_path / "run"))
    broken = run / "checkpoint-2" / ("checkpoint.json" if damage == "manifest" else TEXT)
    if damage == "missing":
        broken.unlink()
    else:
        broken.write_bytes(broken.read_bytes()[:-10] + bytes(10))
    log = run / "metrics.jsonl"
    log.write_text('{"step": 1, \0\0}\n[1]\n{"loss": 1}\n' + log.read_text() + '{"step": 2, "lo')
    train(tmp_path, **LATEST)
    assert not [line for line in log.read_bytes().splitlines() if line.endswith((b"\0}", b"[1]", b'"lo'))]
    (message,) = [
        record.message for record in caplog.records if "Resuming from the previous checkpoint" in record.message
    ]
    assert "checkpoint-2" in message
    assert f"continues from {run / 'checkpoint-1'}" in caplog.messages
    assert_same_bits(run, ended)
    for checkpoint in run.glob("checkpoint-*"):
        (checkpoint / "scheduler.bin").unlink()
    named = r"checkpoint-\d .*checkpoint-\d .* start a new run in another --output_dir"
    with pytest.raises(ValueError, match=rf"all checkpoints in .* are damaged\. .*{named}"):
        train(tmp_path, **LATEST)
    with pytest.raises(ValueError, match=r"incomplete: scheduler\.bin is missing"):
        train(tmp_path, resume_from_checkpoint=str(run / "checkpoint-1"))


# ---------------------------------------------------------------- from an adapter

STILL: dict[str, Any] = {"learning_rate": 1e-30, "core_learning_rate": 1e-30, "max_train_steps": 1, "seed": 8}
"""A step by which no float32 changes."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    shared = {"target_modules": ["to_q", "conv1"], "checkpointing_steps": None, "curve_points": 1}
    shared |= {"min_noise_level": 0.3, "train_text_encoder": True}
    return image_flags(tmp_path_factory.mktemp("model"), small_sdxl()) | shared


@pytest.fixture(scope="module")
def start(images: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "run"
    main(image_arguments(images, folder, max_train_steps=2, learning_rate=0.05))
    return folder


def check_starts(found: Path, given: Path) -> None:
    """The same tensors, to what a step may change."""
    tensors, expected = load_file(found), load_file(given)
    assert tensors.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(tensors[key], tensor, rtol=0, atol=1e-12)


def check_measured_from_the_start(report: dict[str, Any], folder: Path, given: Path, log: str) -> None:
    """After a step that changes nothing, both measurements are of the adapter that was given."""
    torch.testing.assert_close(report["curve_before"], report["curve_after"], rtol=1e-6, atol=0)
    assert report["starts_from"] == given.name  # results.json has no folders of this machine
    assert f"starts from: {given}, which `before` includes" in log
    card = (folder / "README.md").read_text()
    assert f"- starts from: {given.name}, which `before` includes" in card


@pytest.mark.slow
def test_run_begins_where_the_file_ends(
    images: dict[str, Any], start: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    report = main(image_arguments(images, tmp_path / "again", init_adapter=str(start / IMAGES), **STILL))
    check_measured_from_the_start(report, tmp_path / "again", start / IMAGES, caplog.text)
    check_starts(tmp_path / "again" / IMAGES, start / IMAGES)
    last_of_core = "unet.nara_core.shared.layers.2.weight"
    tensors = load_file(start / IMAGES)
    names = [key for key in tensors if key.startswith("unet.") and "lora_B" in key] + [last_of_core]
    assert all(tensors[key].any() for key in names)  # a fresh adapter has zeros there
    strengths = [AdapterFile.read(folder).parts["unet"].config.strength for folder in (start, tmp_path / "again")]
    assert strengths == [[[0.3, 0.0], [0.3, 1.0]]] * 2


def test_text_run_begins_where_the_folder_ends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    short: dict[str, Any] = {"test_samples": 1, "curve_points": 1, "checkpointing_steps": 1}
    first = dllm.main(text_arguments(tmp_path, **short, max_train_steps=2))
    start = short | {"init_adapter": str(tmp_path / "run"), "output_dir": str(tmp_path / "again")}
    again = dllm.main(text_arguments(tmp_path, **start, **STILL))
    check_starts(tmp_path / "again" / TEXT, tmp_path / "run" / TEXT)
    check_measured_from_the_start(again, tmp_path / "again", tmp_path / "run", caplog.text)
    resumed = short | {"init_adapter": str(tmp_path / "again"), "resume_from_checkpoint": "checkpoint-1"}
    longer = dllm.main(text_arguments(tmp_path, **resumed, max_train_steps=3))
    for report in (again, longer):
        torch.testing.assert_close(report["curve_before"], first["curve_after"], rtol=1e-6, atol=0)
    assert longer["curve_after"] != longer["curve_before"]


def test_text_run_refuses_an_image_adapter(start: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is an image adapter, for .*\. Give an adapter of a language model"):
        dllm.main(text_arguments(tmp_path, init_adapter=str(start)))


def start_with(*flags: Any, **changes: Any) -> None:
    """Start the adapter that the arguments describe, as a run does."""
    args, pipe = image_arguments(*flags, **changes), small_sdxl()
    config: Any = adapter_config(args, noise_convention="timestep", strength=schedule_of(args))
    model = AdaptedDenoiser(pipe, config, train_text_encoder=args.train_text_encoder)
    start_from(model.components, str(args.init_adapter), pipe)


def test_other_flags_than_the_file_s_are_refused(images: dict[str, Any], start: Path, tmp_path: Path) -> None:
    """By the arguments, or by the adapter that they describe."""
    for changes, message in [
        (
            {"adapter_options": {"core_hidden_dims": [8, 7], "core_sharing": "layer"}},
            "'global', but this run has 'layer'",
        ),
        ({"min_noise_level": 0.2}, "has the strength .* Give the same --min_noise_level and --max_noise"),
        ({"rank": 2}, "has r 3, but this run has 2. Give --rank"),
        ({"train_text_encoder": False}, "but this run trains unet"),
        ({"adapter": "lora"}, "is a NaRA with core_type 'hypernetwork'"),
        ({"adapter": "hira"}, "init_adapter starts from a LoRA or a NaRA"),
        ({"init_adapter": "nowhere"}, "there is no such file or folder"),
    ]:
        values = {"init_adapter": str(start), **STILL, **changes}
        with pytest.raises(ValueError, match=message):
            start_with(images, tmp_path / "run", **values)
