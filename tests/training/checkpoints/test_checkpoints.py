"""What a checkpoint holds, and every reason to refuse one."""

import hashlib
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

from nara_diffusion.training.checkpoints.folders import (
    _delete_oldest,
    find_checkpoints,
    last_checkpoint,
    locate_checkpoint,
    resolve_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)
from nara_diffusion.training.run import start_run


@pytest.fixture
def checkpoint(small_args, small_run) -> Path:
    return small_run(small_args(max_train_steps=2)).run.folder / "checkpoint-2"


def test_it_holds_all_that_a_resume_needs(checkpoint: Path) -> None:
    assert sorted(entry.name for entry in checkpoint.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "checkpoint.json",
        "optimizer.bin",
        "random_states_0.pkl",
        "scheduler.bin",
    ]
    manifest = json.loads((checkpoint / "checkpoint.json").read_text())
    assert (manifest["step"], manifest["processes"], manifest["arguments"]["rank"]) == (2, 1, 3)
    assert len(manifest["files"]) == 5


def test_its_adapter_is_the_models(small_args, small_run) -> None:
    result = small_run(small_args(max_train_steps=2))
    saved = load_file(result.run.folder / "checkpoint-2" / "adapter_model.safetensors")
    current = get_peft_model_state_dict(result.model)
    assert saved.keys() == current.keys()
    assert any("nara_core." in name for name in saved)
    for name, value in current.items():
        torch.testing.assert_close(saved[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.bin", "random_states_0.pkl"])
def test_a_corrupt_file_is_named(checkpoint: Path, small_args, name: str) -> None:
    content = bytearray((checkpoint / name).read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is corrupt"):
        start_run(small_args(max_train_steps=2, resume_from_checkpoint="latest"), "small")


def test_a_missing_file_is_named(checkpoint: Path, small_args) -> None:
    (checkpoint / "scheduler.bin").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-2 is incomplete: scheduler.bin is missing"):
        start_run(small_args(max_train_steps=2, resume_from_checkpoint=str(checkpoint)), "small")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"step": 2}'])
def test_a_corrupt_manifest_is_named(checkpoint: Path, small_args, content: str) -> None:
    (checkpoint / "checkpoint.json").write_text(content)
    with pytest.raises(ValueError, match=r"checkpoint.json is missing or corrupt"):
        verify_checkpoint(checkpoint, small_args(max_train_steps=2), processes=1, engine="one process or DDP")


def test_another_configuration_is_refused(checkpoint: Path, small_args) -> None:
    args = small_args(
        max_train_steps=2, learning_rate=0.5, core_type="constant", resume_from_checkpoint=str(checkpoint)
    )
    with pytest.raises(ValueError, match=r"another configuration") as error:
        start_run(args, "small")
    assert "learning_rate: 0.01 there, 0.5 now" in str(error.value)
    assert "core_type: 'hypernetwork' there, 'constant' now" in str(error.value)
    assert "rank" not in str(error.value)


def test_what_does_not_change_the_result_may_differ(checkpoint: Path, small_args) -> None:
    args = small_args(max_train_steps=2, logging_steps=7, checkpoints_total_limit=9, report_to=None)
    assert verify_checkpoint(checkpoint, args, processes=1, engine="one process or DDP") == 2


def test_an_argument_that_is_younger_than_the_checkpoint_had_its_default(checkpoint: Path, small_args) -> None:
    manifest = json.loads((checkpoint / "checkpoint.json").read_text())
    del manifest["arguments"]["weight_decay"], manifest["arguments"]["core_hidden_dims"]
    (checkpoint / "checkpoint.json").write_text(json.dumps(manifest))
    args = small_args(max_train_steps=2, core_hidden_dims=[256, 512])
    assert verify_checkpoint(checkpoint, args, processes=1, engine="one process or DDP") == 2
    with pytest.raises(ValueError, match=r"weight_decay: 0\.0 there, 0\.5 now"):
        verify_checkpoint(
            checkpoint, small_args(max_train_steps=2, weight_decay=0.5), processes=1, engine="one process or DDP"
        )


def test_another_number_of_processes_is_refused(checkpoint: Path, small_args) -> None:
    with pytest.raises(ValueError, match="written by 1 processes and this run has 2"):
        verify_checkpoint(checkpoint, small_args(max_train_steps=2), processes=2, engine="one process or DDP")


def test_another_engine_is_refused(checkpoint: Path, small_args) -> None:
    with pytest.raises(ValueError, match=r"under one process or DDP and this run is under DeepSpeed ZeRO-2"):
        verify_checkpoint(checkpoint, small_args(max_train_steps=2), processes=1, engine="DeepSpeed ZeRO-2")


def test_latest_of_one_time_of_writing_is_the_highest_number_and_skips_unfinished_folders(checkpoint: Path) -> None:
    folder = checkpoint.parent
    shutil.copytree(checkpoint, folder / "checkpoint-10")
    shutil.copytree(checkpoint, folder / ".partial-checkpoint-30")
    (folder / "checkpoint-best").mkdir()
    (folder / "checkpoint-99").write_text("a file")
    assert sorted(find_checkpoints(folder)) == [2, 10]
    assert resolve_checkpoint("latest", folder) == folder / "checkpoint-10"


def test_latest_after_a_run_that_went_back_is_the_checkpoint_written_last(small_args, small_run) -> None:
    """Of 2, 4 and 6 the run goes back to 2 and writes 4 again, so that 6 is of the time before."""
    folder = small_run(small_args()).run.folder
    run = start_run(small_args(resume_from_checkpoint=str(folder / "checkpoint-2")), "small")
    run.open()
    assert resolve_checkpoint("latest", folder) == folder / "checkpoint-6"
    save_checkpoint(run.accelerator, run.args, folder, 4)
    assert resolve_checkpoint("latest", folder) == folder / "checkpoint-4"
    assert f"--resume_from_checkpoint {folder / 'checkpoint-4'}" in last_checkpoint(folder)


def test_latest_beside_a_checkpoint_that_says_no_time_raises(small_args, small_run) -> None:
    """It may be the newest."""
    folder = small_run(small_args()).run.folder
    (folder / "checkpoint-4" / "checkpoint.json").write_text("{")
    with pytest.raises(ValueError, match=r"checkpoint-4/checkpoint.json is missing or corrupt"):
        resolve_checkpoint("latest", folder)
    assert f"--resume_from_checkpoint {folder / 'checkpoint-6'}" in last_checkpoint(folder)


def test_nothing_to_resume_from_is_said(tmp_path, small_args) -> None:
    with pytest.raises(ValueError, match=r"latest: .* holds no checkpoint-N folder"):
        start_run(small_args(resume_from_checkpoint="latest"), "small")
    with pytest.raises(ValueError, match=r"is no checkpoint: it has no checkpoint.json"):
        start_run(small_args(resume_from_checkpoint=str(tmp_path)), "small")


def test_a_bare_name_is_the_checkpoint_of_the_run(small_args, small_run) -> None:
    folder = small_run(small_args()).run.folder
    with start_run(small_args(output_dir=str(folder), resume_from_checkpoint="checkpoint-4"), "small") as run:
        assert run.checkpoint == folder / "checkpoint-4"
        assert (run.step, run.folder) == (4, folder)
    with pytest.raises(ValueError, match=r"checkpoint-3 is no .* has checkpoint-2, checkpoint-4, checkpoint-6\)"):
        start_run(small_args(output_dir=str(folder), resume_from_checkpoint="checkpoint-3"), "small")


def test_a_bare_name_in_the_current_folder_is_that_one(checkpoint: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(checkpoint.parent)
    assert locate_checkpoint("checkpoint-2", tmp_path / "other") == "checkpoint-2"
    assert locate_checkpoint("checkpoint-3", tmp_path / "other") == str(tmp_path / "other" / "checkpoint-3")


def test_without_output_dir_latest_looks_in_the_newest_numbered_run(
    checkpoint: Path, small_args, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint, tmp_path / "outputs/small-3/checkpoint-2")
    (tmp_path / "outputs/small-4").mkdir()
    run = start_run(small_args(max_train_steps=2, output_dir=None, resume_from_checkpoint="latest"), "small")
    run.open()
    assert (run.step, run.folder) == (2, Path("outputs/small-3"))


def test_other_data_are_refused(small_args, small_run, tmp_path) -> None:
    with start_run(small_args(max_train_steps=2), "small") as first:
        first.record_data_digest("training data", ["a question", "its answer"])
        first.open()
        checkpoint = save_checkpoint(first.accelerator, first.args, first.folder, 0, first.digests)
    resumed = start_run(small_args(max_train_steps=2, resume_from_checkpoint=str(checkpoint)), "small")
    resumed.record_data_digest("training data", ["a question", "its answer"])
    for texts in (["a question"], ["its answer", "a question"], ["a questionits answer"], ["a questio", "nits answer"]):
        with pytest.raises(ValueError, match=r"checkpoint-0 belongs to a run with other training data: bring it back"):
            resumed.record_data_digest("training data", texts)


def test_a_checkpoint_of_an_earlier_version_is_refused(checkpoint: Path, small_args) -> None:
    manifest = json.loads((checkpoint / "checkpoint.json").read_text())
    del manifest["engine"]
    (checkpoint / "checkpoint.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"checkpoint-2 is of an earlier version"):
        start_run(small_args(max_train_steps=2, resume_from_checkpoint=str(checkpoint)), "small")


def test_going_on_in_another_runs_folder_is_refused(checkpoint: Path, small_args, tmp_path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "adapter_model.safetensors").write_text("precious")
    args = small_args(max_train_steps=2, resume_from_checkpoint=str(checkpoint), output_dir=str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"other already holds another run or other files \(adapter_model"):
        start_run(args, "small")


def rewrite(checkpoint: Path, name: str, content: bytes) -> None:
    """As if the file had been as bad when the checkpoint was written: with its digest."""
    (checkpoint / name).write_bytes(content)
    manifest = json.loads((checkpoint / "checkpoint.json").read_text())
    manifest["files"][name] = hashlib.sha256(content).hexdigest()
    (checkpoint / "checkpoint.json").write_text(json.dumps(manifest))


def pickled(content: dict) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("spoilt", ["truncated", "empty", "without torch's", "other length"])
def test_random_states_that_cannot_be_restored_are_refused(checkpoint, small_args, small_run, spoilt: str) -> None:
    file = checkpoint / "random_states_0.pkl"
    states = torch.load(file, weights_only=False)
    content = {
        "truncated": file.read_bytes()[:300],
        "empty": b"",
        "without torch's": pickled({name: value for name, value in states.items() if name != "torch_manual_seed"}),
        "other length": pickled(states | {"torch_manual_seed": states["torch_manual_seed"][:-8]}),
    }[spoilt]
    rewrite(checkpoint, file.name, content)
    with pytest.raises(ValueError, match=r"random_states_0.pkl doesn't give the random states back \(.*\).*another"):
        small_run(small_args(max_train_steps=2, resume_from_checkpoint="latest"))


@pytest.mark.parametrize(("limit", "kept"), [(1, {4}), (2, {4, 6}), (3, {2, 4, 6}), (None, {2, 4, 6})])
def test_the_limit_keeps_a_checkpoint_that_is_written_anew(small_args, small_run, limit: int | None, kept) -> None:
    """Of 2, 4 and 6 the run goes back to 2 and writes 4 again."""
    folder = small_run(small_args()).run.folder
    back = {"resume_from_checkpoint": str(folder / "checkpoint-2"), "checkpoints_total_limit": limit}
    run = start_run(small_args(**back), "small")
    run.open()
    save_checkpoint(run.accelerator, run.args, folder, 4)
    assert set(find_checkpoints(folder)) == kept


def test_the_limit_goes_by_the_time_of_writing_and_not_by_that_of_copying(small_args, small_run, tmp_path) -> None:
    written = small_run(small_args()).run.folder
    folder = tmp_path / "copy"
    for name in ("checkpoint-6", "checkpoint-2", "checkpoint-4"):
        shutil.copytree(written / name, folder / name, copy_function=shutil.copyfile)
    run = start_run(small_args(output_dir=str(folder), resume_from_checkpoint="latest"), "small")
    run.open()
    args = small_args(checkpoints_total_limit=2)
    save_checkpoint(run.accelerator, args, folder, 8)
    assert set(find_checkpoints(folder)) == {6, 8}


def test_a_checkpoint_that_is_half_deleted_is_no_checkpoint(small_args, small_run, monkeypatch) -> None:
    def fails(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            (path / "checkpoint.json").unlink()
            raise OSError("killed")

    run = small_run(small_args()).run
    monkeypatch.setattr(shutil, "rmtree", fails)
    with pytest.raises(OSError, match="killed"):
        _delete_oldest(run.folder, 1, newest=run.folder / "checkpoint-6")
    assert set(find_checkpoints(run.folder)) == {4, 6}
