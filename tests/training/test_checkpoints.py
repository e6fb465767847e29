"""What a checkpoint holds, which one is taken, when one is deleted, and whose folder a run may write to."""

from __future__ import annotations

import errno
import json
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from filelock import FileLock

from nara_diffusion.dllm import masked_diffusion_loss
from nara_diffusion.dllm import train as dllm
from nara_diffusion.dllm.kinds.masked_kind import MASKED
from nara_diffusion.dreambooth.image_arguments import DreamBoothArguments
from nara_diffusion.training.checkpoints import (
    latest_undamaged,
    read_manifest,
    resume_hint,
    save_adapter,
    write_manifest,
)
from nara_diffusion.training.command import InterruptRequest, TrainingDiverged
from nara_diffusion.training.run_folder import check_random_states, check_same_run
from nara_diffusion.utils.files import digest_base, digest_texts
from nara_flags.parser import parse_arguments
from tests.acceptance._commands import names
from tests.acceptance._runs import TEXT, text_arguments

SHORT: dict[str, Any] = {"max_train_steps": 4, "checkpointing_steps": 1, "test_samples": 1, "curve_points": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    dllm.main(text_arguments(folder, **SHORT))
    return folder / "run"


def test_checkpoint_has_a_manifest_of_files_and_digests(run: Path) -> None:
    assert {name for name in names(run) if name.startswith("checkpoint")} == {"checkpoint-3", "checkpoint-4"}
    manifest = json.loads((run / "checkpoint-4" / "checkpoint.json").read_text())
    assert manifest["files"].keys() == names(run / "checkpoint-4") - {"checkpoint.json"}
    assert {TEXT, "optimizer.bin", "scheduler.bin", "random_states_0.pkl"} <= manifest["files"].keys()
    assert all((run / "checkpoint-4" / name).stat().st_size == size for name, (size, _) in manifest["files"].items())
    digests = {"training data", "validation data", "base model", "base model configuration config.json"}
    assert manifest["digests"].keys() == digests
    assert (manifest["step"], manifest["processes"], manifest["engine"]) == (4, 1, "one process or DDP")
    assert manifest["arguments"]["adapter_options"] == {"core_hidden_dims": [8, 7]}


def test_latest_is_the_one_written_last(run: Path, tmp_path: Path) -> None:
    assert latest_undamaged(run) == run / "checkpoint-4"
    assert resume_hint(run).endswith(f"--resume_from_checkpoint {run / 'checkpoint-4'}")
    manifest = read_manifest(run / "checkpoint-3")
    write_manifest(run / "checkpoint-3", manifest | {"written": 1e12})
    assert latest_undamaged(run) == run / "checkpoint-3"
    write_manifest(run / "checkpoint-3", manifest)
    named = text_arguments(tmp_path, **SHORT, resume_from_checkpoint=str(run / "checkpoint-9"))
    with pytest.raises(ValueError, match=r"is not a checkpoint, .* has checkpoint-3, checkpoint-4"):
        dllm.main(named)


@pytest.mark.parametrize("lost", ["unlogged", "arguments"])
def test_incomplete_manifest_makes_resume_use_earlier_one(
    run: Path, tmp_path: Path, lost: str, caplog: pytest.LogCaptureFixture
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    path = copy / "checkpoint-4" / "checkpoint.json"
    content = json.loads(path.read_text())
    del content[lost]
    path.write_text(json.dumps(content))
    assert latest_undamaged(copy) == copy / "checkpoint-3"
    assert re.search(r"checkpoint-4/checkpoint\.json is corrupt: .* Resuming from the previous checkpoint", caplog.text)


def test_random_states_that_cannot_be_restored_raise(run: Path) -> None:
    with pytest.raises(ValueError, match=r"random_states_0.pkl doesn't restore the random states"):
        check_random_states(run / "checkpoint-4", 0)  # nothing was loaded
    with pytest.raises(ValueError, match=r"random_states_1.pkl can't be read"):
        check_random_states(run / "checkpoint-4", 1)


ENGINES = ["FSDP2 with FULL_STATE_DICT", "FSDP2 with SHARDED_STATE_DICT", "DeepSpeed ZeRO-2"]


@pytest.mark.parametrize("engine", ENGINES)
def test_resume_that_runs_pickles_warns_once(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    folder = Path(shutil.copytree(run.parent, tmp_path / "copy"))
    monkeypatch.setattr("nara_diffusion.training.run.engine_name", lambda accelerator: engine)
    dllm.main(text_arguments(folder, **SHORT, resume_from_checkpoint="latest"))
    warned = [message for message in caplog.messages if "resuming runs the code in them" in message]
    assert len(warned) == ("SHARDED" in engine or "ZeRO" in engine)
    assert all(f"checkpoint-4: {engine} stores its state in pickles" in message for message in warned)


def test_full_disk_leaves_earlier_checkpoints_only(tmp_path: Path) -> None:
    def write(model: Any, folder: Path, state: Any) -> None:
        (folder / TEXT).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    args = text_arguments(tmp_path, **SHORT, validation_steps=None)
    with dllm.start_run(args, "dllm", dllm.write_checkpoint) as run, pytest.MonkeyPatch.context() as patch:
        steps: list[int] = []

        def full(*parts: Any) -> None:
            steps.append(1)
            (dllm.write_checkpoint if len(steps) < 3 else write)(*parts)

        patch.setattr(run, "write", full)
        with pytest.raises(OSError, match=r"checkpoint-3 could not be written .* --resume_from_checkpoint .*-2$"):
            dllm.fine_tune(dllm.prepare(args, run))
    assert names(tmp_path / "run") == {"checkpoint-1", "checkpoint-2", "config.yaml", "metrics.jsonl"}
    model = torch.nn.Linear(2, 2)
    with pytest.raises(OSError, match="The adapter could not be written"):
        save_adapter(Accelerator(), model, tmp_path / "run", write)
    assert TEXT not in names(tmp_path / "run")


@pytest.mark.parametrize("steps", [2, 4])
def test_ctrl_c_while_writing_stops_after_the_checkpoint(
    steps: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of two steps, the last one's checkpoint; of four, one on the way."""

    def write(model: Any, folder: Path, state: Any) -> None:
        written.append(folder)
        if len(written) == 2:
            signal.raise_signal(signal.SIGINT)
        dllm.write_checkpoint(model, folder, state)

    written: list[Path] = []
    args = text_arguments(tmp_path, **SHORT | {"max_train_steps": steps})
    with pytest.raises(SystemExit) as stop, dllm.start_run(args, "dllm", write) as run:
        dllm.fine_tune(dllm.prepare(args, run))
    assert stop.value.code == 128 + signal.SIGINT
    assert len(written) == 2
    last = tmp_path / "run" / "checkpoint-2"
    assert (
        f"stopped after step 2. To continue, run the same command with --resume_from_checkpoint {last}" in caplog.text
    )


def test_divergence_stops_before_it_is_saved(tmp_path: Path) -> None:
    args = text_arguments(tmp_path, **SHORT)
    with pytest.MonkeyPatch.context() as patch:
        steps: list[int] = []

        def diverging(*parts: Any, **options: Any) -> Any:
            steps.append(1)
            value = masked_diffusion_loss(*parts, **options)
            value.per_sample[0] *= float("nan") if len(steps) == 3 else 1.0
            return value

        patch.setattr(
            "nara_diffusion.dllm.text_data.kind_of", lambda backbone, flags=None: replace(MASKED, loss=diverging)
        )
        with pytest.raises(TrainingDiverged, match=r"In step 3 the loss became nan\. .*checkpoint-2$"):
            dllm.main(args)


def test_folder_of_another_run_is_refused_before_loading(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dllm, "load_records", None)
    with pytest.raises(ValueError, match="already holds another run or other files"):
        dllm.main(text_arguments(run.parent, **SHORT))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="can't be written"):
        dllm.main(text_arguments(tmp_path, **SHORT | {"output_dir": tmp_path / "file" / "out"}))
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"), pytest.raises(ValueError, match="in use by another run"):
        dllm.main(text_arguments(tmp_path, **SHORT))
    assert names(tmp_path / "run") <= {".lock"}
    with pytest.raises(TypeError):  # by the records that can't be loaded here
        dllm.main(text_arguments(tmp_path, **SHORT | {"output_dir": tmp_path / "deep" / "run"}))
    assert not (tmp_path / "deep").exists()


def test_run_with_removed_option_is_refused_if_on(run: Path, tmp_path: Path) -> None:
    """An earlier version's `--prediction_type v_prediction` would go on as what the base predicts."""
    args, accelerator = parse_arguments(dllm.Arguments, ["--config", str(run / "config.yaml")]), Accelerator(cpu=True)
    for value in (None, False, "v_prediction"):
        folder = tmp_path / str(value)
        shutil.copytree(run / "checkpoint-4", folder)
        manifest = json.loads((folder / "checkpoint.json").read_text())
        manifest["arguments"]["prediction_type"] = value
        (folder / "checkpoint.json").write_text(json.dumps(manifest))
        if value:
            with pytest.raises(ValueError, match="prediction_type: 'v_prediction' there"):
                check_same_run(folder, args, accelerator)
        else:
            check_same_run(folder, args, accelerator)


def test_settings_of_run_are_an_arguments_file(run: Path) -> None:
    args = parse_arguments(dllm.Arguments, ["--config", str(run / "config.yaml")])
    assert vars(args) == yaml.safe_load((run / "config.yaml").read_text())
    again = parse_arguments(DreamBoothArguments, ["--pretrained_model_name_or_path", "x", "--instance_data_dir", "y"])
    (run.parent / "image.yaml").write_text(yaml.safe_dump(vars(again)))
    assert parse_arguments(DreamBoothArguments, ["--config", str(run.parent / "image.yaml")]) == again


def test_digests_know_texts_and_weights_again(tmp_path: Path) -> None:
    assert digest_texts(["a", "b"]) == digest_texts(iter(["a", "b"])) != digest_texts(["ab"])
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    (tmp_path / "model.fp16.safetensors").write_bytes(b"2")
    plain, half = digest_base({"": tmp_path}), digest_base({"": tmp_path}, "fp16")
    assert plain.keys() == {"base model", "base model configuration config.json"}
    assert plain["base model"] != half["base model"]
    (tmp_path / "model.safetensors").unlink()
    for number in (1, 2):
        (tmp_path / f"model-0000{number}-of-00002.safetensors").write_bytes(b"3")
    assert digest_base({"": tmp_path})["base model"] not in (plain["base model"], half["base model"])


def test_second_ctrl_c_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0])
    monkeypatch.setattr("nara_diffusion.training.command.time.monotonic", lambda: next(clock))
    handler = signal.getsignal(signal.SIGINT)
    with InterruptRequest() as request:
        for _ in range(2):  # the second within a second, which is the launcher's
            signal.raise_signal(signal.SIGINT)
        assert request.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is handler
