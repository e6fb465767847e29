"""A run that a signal ends, at a step or while it writes a checkpoint, goes on to the bits of an undisturbed one."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.acceptance._commands import (
    Moment,
    assert_same_bits,
    check_leaves_the_base_out,
    ended_early,
    names,
    refusal,
    results,
    run,
)
from tests.acceptance._runs import ASSETS, TEXT, block_flags, image_flags, text_flags
from tests.helpers.small_pipelines import small_sd3, small_sdxl

ENDS = [Moment("step", 3), Moment("name", 4), Moment("step", 3, signal.SIGTERM), Moment("step", 3, signal.SIGINT)]
"""When a text run ends: at a step, or before a checkpoint has its name; or is asked to."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    flags = text_flags(tmp_path_factory.mktemp("data"))
    return flags | {"gradient_accumulation_steps": 2, "train_batch_size": 2, "complementary": True}


@pytest.fixture(scope="module")
def undisturbed(text: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    run("dllm.py", **text, output_dir=folder)
    return folder


def check_goes_on(script: str, moment: Moment, folder: Path, caplog: pytest.LogCaptureFixture, **flags: Any) -> None:
    """Run the script until the moment, when it can save where a signal asks it to stop; then with one more flag."""
    out, log = folder / "out", folder / "log"
    code, printed = ended_early(script, moment, log, **flags, output_dir=out), log.read_text()
    stops = moment.signal != signal.SIGKILL
    assert code == (128 + moment.signal if stops else -signal.SIGKILL), printed[-2000:]
    assert ("--resume_from_checkpoint" in printed) >= stops
    there, last = names(out), f"checkpoint-{moment.number if stops else 2}"
    assert last in there
    assert stops or "checkpoint-4" not in there
    assert not [name for name in there if name.endswith((".safetensors", "results.json"))]
    with caplog.at_level("INFO"):
        run(script, **flags, output_dir=out, resume_from_checkpoint="latest")
    assert f"continues from {out / last}" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("moment", ENDS, ids=lambda moment: f"{moment.signal.name} at {moment.what}")
def test_text_run_resumed_ends_with_same_bits(
    text: dict[str, Any], undisturbed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, moment: Moment
) -> None:
    check_goes_on("dllm.py", moment, tmp_path, caplog, **text)
    out = tmp_path / "out"
    assert_same_bits(out, undisturbed)
    assert results(out) | {"seconds": 0} == results(undisturbed) | {"seconds": 0}
    assert {name for name in names(out) if "checkpoint" in name} == {"checkpoint-4", "checkpoint-6"}


@pytest.mark.slow
def test_killed_canvas_run_resumes_to_same_bits(
    text: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = text | {"pretrained_model_name_or_path": ASSETS / "gemma-tiny", "gen_length": 16, "complementary": False}
    flags |= {"target_modules": ["all-linear"], "adapter": "nara_dora", "max_length": 60}
    run("dllm.py", **flags, output_dir=tmp_path / "whole")
    check_goes_on("dllm.py", Moment("step", 3), tmp_path, caplog, **flags)
    assert_same_bits(tmp_path / "out", tmp_path / "whole")


@pytest.mark.slow
def test_killed_llada2_run_resumes_to_same_bits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    flags, uninterrupted = block_flags(tmp_path), tmp_path / "whole"
    run("dllm.py", **flags, output_dir=uninterrupted)
    check_goes_on("dllm.py", Moment("step", 3), tmp_path, caplog, **flags)
    assert_same_bits(tmp_path / "out", uninterrupted)


IMAGES: dict[str, Any] = {"gradient_accumulation_steps": 2, "lora_dropout": 0.2, "caption_dropout": 0.3}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "changes", "moment"),
    [
        ("dreambooth_sdxl.py", {"snr_gamma": 5.0, "train_text_encoder": True}, Moment("step", 3)),
        ("dreambooth_sdxl.py", {"random_flip": True}, Moment("name", 4)),
        ("dreambooth.py", {"max_sequence_length": 5, "adapter": "nara_dora"}, Moment("step", 3)),
        ("dreambooth.py", {"max_sequence_length": 5}, Moment("step", 5, signal.SIGTERM)),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch_dtype.*")
def test_image_run_resumed_ends_with_same_bits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, script: str, changes: dict[str, Any], moment: Moment
) -> None:
    make = small_sdxl if script == "dreambooth_sdxl.py" else small_sd3
    flags = image_flags(tmp_path, make()) | IMAGES | changes
    run(script, **flags, output_dir=tmp_path / "whole")
    check_goes_on(script, moment, tmp_path, caplog, **flags)
    assert_same_bits(tmp_path / "out", tmp_path / "whole")


# ---------------------------------------------------------------- what isn't resumed


@pytest.fixture(scope="module")
def stopped(text: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Flags of a run of one step with a checkpoint, on files that a test may copy and change."""
    folder = tmp_path_factory.mktemp("stopped")
    shutil.copytree(text["pretrained_model_name_or_path"], folder / "model")
    files = {name: shutil.copy(path, folder) for name, path in text.items() if name.endswith("_file")}
    short = {
        "max_train_steps": 1,
        "checkpointing_steps": 1,
        "test_samples": 1,
        "curve_points": 1,
    }
    flags = text | files | short | {"pretrained_model_name_or_path": folder / "model", "output_dir": folder / "out"}
    run("dllm.py", **flags)
    return flags


def copied(stopped: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same flags for a copy of everything in `folder`."""
    shutil.copytree(stopped["output_dir"].parent, folder)
    places = {"pretrained_model_name_or_path": folder / "model", "output_dir": folder / "out"}
    return stopped | places | {name: folder / Path(stopped[name]).name for name in stopped if name.endswith("_file")}


def changed_weights(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    next(value for name, value in weights.items() if "q_proj" in name).view(-1)[5] += 1e-3
    save_file(weights, model / "model.safetensors")


def of_version_0_1(checkpoint: Path) -> None:
    fields = json.loads((checkpoint / "checkpoint.json").read_text())
    del fields["format"]
    (checkpoint / "checkpoint.json").write_text(json.dumps(fields))


def test_foreign_or_damaged_checkpoint_is_refused(
    capsys: pytest.CaptureFixture[str], stopped: dict[str, Any], tmp_path: Path
) -> None:
    rows: list[Any] = [
        (lambda there: None, {"rank": 4}, ["other arguments (rank: 3 there, 4 now)", "--init_adapter"]),
        (lambda there: changed_weights(there / "model"), {}, ["base model"]),
        (lambda there: of_version_0_1(there / "out" / "checkpoint-1"), {}, ["version 0.1", "Finish the run with"]),
        (lambda there: (there / "out" / "checkpoint-1" / "random_states_0.pkl").unlink(), {}, ["random_states"]),
    ]
    for number, (change, flags, named) in enumerate(rows):
        folder = tmp_path / str(number)
        there = copied(stopped, folder) | flags
        change(folder)
        message = refusal(capsys, "dllm.py", **there, resume_from_checkpoint=folder / "out" / "checkpoint-1")
        assert all(name in message for name in (*named, "checkpoint-1")), message


def test_checkpoint_is_resumed_where_its_files_have_moved(stopped: dict[str, Any], tmp_path: Path) -> None:
    moved = copied(stopped, tmp_path / "elsewhere")
    file = moved["output_dir"] / TEXT
    expected = file.read_bytes()
    file.unlink()
    run("dllm.py", **moved, resume_from_checkpoint=moved["output_dir"] / "checkpoint-1")
    assert file.read_bytes() == expected
    for folder in (stopped["output_dir"], moved["output_dir"]):  # the resumed run takes no step
        assert json.loads((folder / "adapter_config.json").read_text())["noise_level_per"] == "sample"


def test_checkpoint_holds_the_adapter_and_not_the_base(stopped: dict[str, Any]) -> None:
    checkpoint, base = stopped["output_dir"] / "checkpoint-1", stopped["pretrained_model_name_or_path"]
    check_leaves_the_base_out(checkpoint, base)
    adapter, final = load_file(checkpoint / TEXT), load_file(stopped["output_dir"] / TEXT)
    assert all(torch.equal(value, final[name]) for name, value in adapter.items())


def test_image_run_resumes_only_with_its_configurations(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = image_flags(tmp_path, small_sdxl()) | {"max_train_steps": 1, "checkpointing_steps": 1}
    run("dreambooth_sdxl.py", **flags, output_dir=tmp_path / "run")
    flags |= {"output_dir": tmp_path / "run", "resume_from_checkpoint": tmp_path / "run" / "checkpoint-1"}
    for name, field, value in (("unet/config", "norm_eps", 1e-3), ("scheduler/scheduler_config", "beta_end", 1)):
        file = tmp_path / "model" / f"{name}.json"
        original = file.read_text()
        file.write_text(json.dumps(json.loads(original) | {field: value}))
        message = refusal(capsys, "dreambooth_sdxl.py", **flags)
        assert f"belongs to a run with another base model configuration {name}.json" in message
        file.write_text(original)
