"""The shared loop: accumulation, stages, logging, resuming, and all that can go wrong in between."""

import json
import math
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from nara_diffusion.training.loop import TrainingDiverged

WEIGHTS = "adapter_model.safetensors"


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_accumulation_gives_the_gradient_of_the_whole_batch(small_args, small_run, tmp_path) -> None:
    """SGD-like check: with one step of AdamW from the same start, equal gradients give equal weights."""
    shared = {"lora_dropout": 0.0, "max_train_steps": 3, "checkpointing_steps": None}
    whole = small_run(small_args(train_batch_size=6, output_dir=str(tmp_path / "a"), **shared))
    parts = small_run(
        small_args(train_batch_size=2, gradient_accumulation_steps=3, output_dir=str(tmp_path / "b"), **shared)
    )
    assert len(parts.losses) == 9
    for step, loss in enumerate(whole.losses):
        torch.testing.assert_close(sum(parts.losses[3 * step : 3 * step + 3]) / 3, loss, rtol=1e-5, atol=0)
    logged = [line["loss"] for line in read_metrics(parts.run.folder) if "loss" in line]
    torch.testing.assert_close(logged, whole.losses, rtol=1e-5, atol=0)
    one, other = (load_file(result.run.folder / WEIGHTS) for result in (whole, parts))
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("checkpoint", "step"), [("checkpoint-2", 2), ("latest", 4)])
def test_a_resumed_run_ends_with_the_same_bytes(small_args, small_run, tmp_path, checkpoint: str, step: int) -> None:
    full = small_run(small_args(gradient_accumulation_steps=2))
    expected = (full.run.folder / WEIGHTS).read_bytes()
    metrics = read_metrics(full.run.folder)

    other = tmp_path / "other"
    other.mkdir()
    for name in ("checkpoint-2", "checkpoint-4"):
        shutil.copytree(full.run.folder / name, other / name)
    path = checkpoint if checkpoint == "latest" else str(other / checkpoint)
    resumed = small_run(small_args(gradient_accumulation_steps=2, output_dir=str(other), resume_from_checkpoint=path))
    assert resumed.losses == full.losses[2 * step :]
    assert (other / WEIGHTS).read_bytes() == expected
    assert read_metrics(resumed.run.folder) == [line for line in metrics if line["step"] > step]


def test_resuming_in_place_rewrites_the_log(small_args, small_run) -> None:
    full = small_run(small_args())
    before = read_metrics(full.run.folder)
    small_run(small_args(resume_from_checkpoint=str(full.run.folder / "checkpoint-2")))
    assert read_metrics(full.run.folder) == before


def test_the_core_waits_for_its_stage(small_args, small_run, tmp_path) -> None:
    run = small_run(small_args(core_start_step=3, max_train_steps=6, checkpointing_steps=1))

    def weights(step: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        state = load_file(run.run.folder / f"checkpoint-{step}" / WEIGHTS)
        core = {name: value for name, value in state.items() if "nara_core." in name}
        return core, {name: value for name, value in state.items() if name not in core}

    (core_1, adapter_1), (core_3, adapter_3), (core_5, _) = weights(1), weights(3), weights(5)
    assert core_1
    assert all(core_1[name].equal(value) for name, value in core_3.items())
    assert not all(adapter_1[name].equal(value) for name, value in adapter_3.items())
    assert not all(core_3[name].equal(value) for name, value in core_5.items())


def test_learning_rates_of_both_groups_are_logged(small_args, small_run) -> None:
    run = small_run(small_args(learning_rate=1e-2, core_learning_rate=1e-3, lr_warmup_steps=0.5, max_train_steps=6))
    lines = [line for line in read_metrics(run.run.folder) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    # after step k the schedule stands at k: warm-up over 3 steps, then half a cosine to 0
    expected = [1 / 3, 2 / 3, 1.0, *(0.5 * (1 + math.cos(math.pi * k / 3)) for k in (1, 2, 3))]
    torch.testing.assert_close([line["learning_rate"] for line in lines], [1e-2 * share for share in expected])
    torch.testing.assert_close([line["core_learning_rate"] for line in lines], [1e-3 * share for share in expected])
    assert [line["step"] for line in read_metrics(run.run.folder) if "validation" in line] == [3, 6]


@pytest.mark.parametrize(
    ("spoilt", "message"), [("per_sample", "the loss became nan"), ("loss", "the gradient's norm became nan")]
)
def test_a_run_that_diverges_stops_and_keeps_the_checkpoint(small_args, small_run, spoilt: str, message: str) -> None:
    args = small_args(learning_rate=1e-3)

    def poison(step: int, loss):
        return replace(loss, **{spoilt: getattr(loss, spoilt) * math.nan}) if step == 3 else loss

    with pytest.raises(TrainingDiverged, match=rf"{message} in step 4.*last good checkpoint is .*checkpoint-2"):
        small_run(args, poison)
    folder = Path(args.output_dir)
    assert not (folder / WEIGHTS).exists()
    assert all(value.isfinite().all() for value in load_file(folder / "checkpoint-2" / WEIGHTS).values())


def test_without_a_checkpoint_the_message_says_so(small_args, small_run) -> None:
    with pytest.raises(TrainingDiverged, match=r"nan in step 1.*There is no checkpoint yet.*lower --learning_rate"):
        small_run(small_args(), lambda step, loss: replace(loss, per_sample=loss.per_sample * math.nan))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_resume(small_args, small_run, tmp_path, caplog, number, code) -> None:
    expected = (small_run(small_args(output_dir=str(tmp_path / "whole"))).run.folder / WEIGHTS).read_bytes()
    args = small_args(checkpointing_steps=None)

    def interrupt(step: int, loss):
        if step == 2:
            signal.raise_signal(number)
        return loss

    with pytest.raises(SystemExit) as stop:
        small_run(args, interrupt)
    assert stop.value.code == code
    checkpoint = Path(args.output_dir) / "checkpoint-3"
    assert f"stopped after step 3. To continue, run the same command with --resume_from_checkpoint {checkpoint}" in (
        caplog.text
    )
    small_run(small_args(checkpointing_steps=None, resume_from_checkpoint=str(checkpoint)))
    assert (Path(args.output_dir) / WEIGHTS).read_bytes() == expected


def test_a_full_disk_leaves_nothing_half_written(small_args, small_run) -> None:
    """A limit on file size fails writes as a full disk does, at a byte of our choosing."""
    args = small_args()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(step: int, loss):
        if step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, limits[1]))
        return loss

    try:
        with pytest.raises(
            OSError, match=r"checkpoint-4 could not be written.*disk full.*last whole checkpoint is .*checkpoint-2"
        ):
            small_run(args, fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    folder = Path(args.output_dir)
    assert {entry.name for entry in folder.iterdir()} == {"checkpoint-2", "config.yaml", "metrics.jsonl"}
    small_run(small_args(resume_from_checkpoint="latest"))
    assert (folder / WEIGHTS).exists()


def test_a_disk_that_is_full_at_the_end_leaves_no_half_adapter(small_args, small_run) -> None:
    args = small_args(checkpointing_steps=4)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(step: int, loss):
        if step == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, limits[1]))
        return loss

    try:
        with pytest.raises(OSError, match=r"the adapter could not be written to .*whole checkpoint is .*checkpoint-4"):
            small_run(args, fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {entry.name for entry in Path(args.output_dir).iterdir()} == {"checkpoint-4", "config.yaml", "metrics.jsonl"}


def test_only_the_newest_checkpoints_are_kept(small_args, small_run) -> None:
    run = small_run(small_args(checkpointing_steps=1, checkpoints_total_limit=2))
    assert sorted(entry.name for entry in run.run.folder.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]


def test_bf16_trains_to_nearly_the_same_losses(small_args, small_run, tmp_path) -> None:
    shared = {"lora_dropout": 0.0, "checkpointing_steps": None}
    full = small_run(small_args(**shared, output_dir=str(tmp_path / "a")))
    AcceleratorState._reset_state(True)  # a process has one precision
    half = small_run(small_args(**shared, mixed_precision="bf16", output_dir=str(tmp_path / "b")))
    torch.testing.assert_close(half.losses, full.losses, rtol=0.02, atol=0)
    assert half.losses != full.losses
    assert all(parameter.dtype == torch.float32 for parameter in half.model.parameters() if parameter.requires_grad)


def test_steps_that_fp16_skips_move_neither_weights_nor_schedule(small_args, small_run) -> None:
    """A loss scale that overflows in the first two steps; accelerate gives a scaler on GPUs only, so we hand it one."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-40)
    arguments = {"checkpointing_steps": 1, "max_grad_norm": None, "lr_warmup_steps": 3.0}
    folder = small_run(small_args(**arguments), scaler=scaler).run.folder
    rates = [line["learning_rate"] for line in read_metrics(folder) if "loss" in line]
    skipped = rates.count(0.0)
    assert 1 <= skipped <= 3
    torch.testing.assert_close(rates[skipped : skipped + 2], [1e-2 / 3, 2e-2 / 3])
    before, after = (load_file(folder / f"checkpoint-{step}" / WEIGHTS) for step in (1, skipped))
    assert all(before[name].equal(value) for name, value in after.items())
    moved = load_file(folder / f"checkpoint-{skipped + 2}" / WEIGHTS)
    assert not all(before[name].equal(value) for name, value in moved.items())

    expected = (folder / WEIGHTS).read_bytes()
    assert (folder / "checkpoint-3" / "scaler.pt").is_file()
    resume = small_args(**arguments, resume_from_checkpoint=str(folder / "checkpoint-3"))
    small_run(resume, scaler=torch.amp.GradScaler("cpu"))
    assert (folder / WEIGHTS).read_bytes() == expected
