"""A run under each of accelerate's engines keeps its adapter in float32, and goes on under that engine and on that base
alone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.engines import HAS_DEEPSPEED, in_two_processes
from tests.helpers.small_pipelines import small_sdxl
from tests.train_scripts.dreambooth_runs import fresh_accelerate, tiny_arguments, write_pictures
from train_scripts import dreambooth
from train_scripts.dllm import ASSETS, Arguments, main

needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
needs_deepspeed = pytest.mark.skipif(not HAS_DEEPSPEED, reason="needs DeepSpeed")


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    yield
    fresh_accelerate()


def make_args(output_dir: Path, base: Path = ASSETS / "llada-tiny", **changes: Any) -> Arguments:
    """Four steps on four records, a checkpoint after each."""
    file = output_dir.parent / "records.jsonl"
    records = [{"instruction": f"upper: {text}", "output": text.upper()} for text in ("ab", "cdefg", "hij", "klmnopq")]
    file.write_text("".join(json.dumps(record | {"answer": record["output"]}) + "\n" for record in records))
    settings: dict[str, Any] = {
        "output_dir": str(output_dir),
        "train_file": str(file),
        "validation_file": str(file),
        "rank": 3,
        "lora_alpha": 5.0,
        "lora_dropout": 0.2,
        "target_modules": ["q_proj", "down_proj"],
        "core_hidden_dims": [8, 7],
        "trained_padding": "3",
        "train_batch_size": 2,
        "max_train_steps": 4,
        "max_length": 40,
        "learning_rate": 1e-2,
        "lr_scheduler": "constant",
        "logging_steps": 1,
        "checkpointing_steps": 1,
        "checkpoints_total_limit": None,
        "gen_length": 2,
        "curve_points": 1,
        "test_samples": 2,
    }
    return Arguments(pretrained_model_name_or_path=str(base), **settings | changes)


def train_or_tell(run: tuple[Arguments, Path]) -> None:
    """Call `main`, and write its refusal into a file of the folder for each process."""
    args, refusals = run
    try:
        main(args)
    except ValueError as error:
        (refusals / os.environ["RANK"]).write_text(str(error))


def train(*runs: tuple[str, Arguments]) -> list[str]:
    """Run (engine, arguments), one after the other, in both of two processes, and return their refusals."""
    folder = Path(runs[0][1].output_dir or "").parent / "refusals"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    in_two_processes(train_or_tell, [(engine, (args, folder)) for engine, args in runs])
    return [path.read_text() for path in sorted(folder.iterdir())]


def check_refused(message: str, *runs: tuple[str, Arguments]) -> None:
    refusals = train(*runs)
    assert len(refusals) == 2
    assert all(message in refusal for refusal in refusals), refusals


def adapter_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@needs_gloo
@needs_deepspeed
def test_zero_2_in_bf16_writes_the_adapter_in_float32(tmp_path: Path) -> None:
    assert train(("zero-2", make_args(tmp_path / "run", mixed_precision="bf16"))) == []
    for folder in ("checkpoint-1", "."):
        saved = adapter_of(tmp_path / "run" / folder)
        assert len(saved) == 4 * 4 + 7, sorted(saved)
        assert {value.dtype for value in saved.values()} == {torch.float32}
    for name, value in saved.items():
        if "frequencies" not in name:
            assert "frequencies" in name or (value != value.bfloat16()).any(), f"{name} was rounded to bfloat16"


@pytest.mark.slow
@needs_gloo
@needs_deepspeed
def test_zero_3_in_bf16_trains_all_weights_in_float32(tmp_path: Path) -> None:
    args = make_args(tmp_path / "run", mixed_precision="bf16", adapter="full", lora_alpha=None, learning_rate=1e-3)
    assert train(("zero-3", args)) == []
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    for name, value in saved.items():
        assert "frequencies" in name or (value != value.bfloat16()).any(), f"{name} was rounded to bfloat16"


@pytest.mark.slow
@needs_gloo
@needs_deepspeed
@pytest.mark.parametrize("engine", ["zero-2", "zero-3, all sharded"])
def test_deepspeed_in_bf16_resumes_as_if_uninterrupted_and_learns_what_ddp_does(engine: str, tmp_path: Path) -> None:
    for name, kind in (("whole", engine), ("ddp", "ddp")):
        assert train((kind, make_args(tmp_path / name, mixed_precision="bf16"))) == []
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resume = make_args(tmp_path / "resumed", mixed_precision="bf16", resume_from_checkpoint="latest")
    assert train((engine, resume)) == []
    whole, ddp, start = (adapter_of(tmp_path / name) for name in ("whole", "ddp", "whole/checkpoint-1"))
    for folder in ("checkpoint-4", "."):
        resumed = adapter_of(tmp_path / "resumed" / folder)
        assert resumed.keys() == whole.keys() == ddp.keys() == start.keys()
        for name, value in whole.items():
            torch.testing.assert_close(resumed[name], value, rtol=0, atol=0)
    for name, value in whole.items():  # bfloat16 rounds sums of other orders otherwise, so a few of Adam's steps differ
        assert (ddp[name] - value).norm() <= 0.1 * (value - start[name]).norm(), name


@needs_gloo
def test_resume_under_another_engine_is_refused_by_name(tmp_path: Path) -> None:
    args = make_args(tmp_path / "run")
    resume = make_args(tmp_path / "run", resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    message = "checkpoint-4 was written under one process or DDP and this run is under FSDP2 with SHARDED_STATE_DICT"
    check_refused(message, ("ddp", args), ("fsdp", resume))


@pytest.mark.slow
@needs_gloo
@needs_deepspeed
def test_deepspeed_checkpoint_under_ddp_and_fp16_are_refused(tmp_path: Path) -> None:
    assert train(("zero-2", make_args(tmp_path / "run"))) == []
    resume = make_args(tmp_path / "run", resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    message = "checkpoint-4 was written under DeepSpeed ZeRO-2 and this run is under one process or DDP"
    check_refused(message, ("ddp", resume))
    fp16 = make_args(tmp_path / "fp16", mixed_precision="fp16")
    check_refused("mixed_precision is fp16, in which DeepSpeed would round", ("zero-2", fp16))
    assert not (tmp_path / "fp16").exists()


@pytest.mark.slow
@needs_gloo
@needs_deepspeed
def test_zero_3_checkpoint_on_another_base_is_refused(tmp_path: Path) -> None:
    base = copy_base(tmp_path)
    assert train(("zero-3", make_args(tmp_path / "run", base))) == []
    change_weights(base)
    resume = make_args(tmp_path / "run", base, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    check_refused("checkpoint-1 belongs to a run with another base model", ("zero-3", resume))


def copy_base(folder: Path) -> Path:
    shutil.copytree(ASSETS / "llada-tiny", folder / "base")
    return folder / "base"


def change_weights(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    weights["model.transformer.blocks.1.q_proj.weight"][3, 5] += 1e-3
    save_file(weights, base / "model.safetensors")


def change_field(file: Path, name: str, value: Any) -> None:
    fields = json.loads(file.read_text())
    assert fields[name] != value
    file.write_text(json.dumps(fields | {name: value}))


def test_text_run_resumes_only_on_the_weights_and_the_configuration_it_began_with(tmp_path: Path) -> None:
    base = copy_base(tmp_path)
    config = (base / "config.json").read_text()
    main(make_args(tmp_path / "run", base))
    resume = {"resume_from_checkpoint": str(tmp_path / "run" / "checkpoint-1")}
    for name, value in (("rope_theta", 20000.0), ("rms_norm_eps", 1e-4), ("mask_token_id", 282)):
        change_field(base / "config.json", name, value)
        fresh_accelerate()
        with pytest.raises(ValueError, match=r"checkpoint-1 belongs .* another base model configuration config\.json"):
            main(make_args(tmp_path / "run", base, **resume))
        (base / "config.json").write_text(config)
    change_weights(base)
    fresh_accelerate()
    with pytest.raises(ValueError, match=r"checkpoint-1 belongs to a run with another base model: bring it back"):
        main(make_args(tmp_path / "run", base, **resume))
    fresh_accelerate()
    main(make_args(tmp_path / "run", copy_base(tmp_path / "elsewhere"), **resume))


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        ("vae/config.json", "scaling_factor", 0.5),
        ("unet/config.json", "norm_eps", 1e-3),
        ("scheduler/scheduler_config.json", "beta_end", 0.05),
        ("own-vae/config.json", "scaling_factor", 0.5),
    ],
)
def test_image_run_resumes_only_on_the_configurations_it_began_with(
    tmp_path: Path, file: str, name: str, value: float
) -> None:
    base, pictures = tmp_path / "base", write_pictures(tmp_path / "pictures", 2)
    small_sdxl().save_pretrained(base)
    options: dict[str, Any] = {"max_train_steps": 2, "checkpointing_steps": 1, "num_validation_images": 1}
    options["curve_points"] = 1
    if file.startswith("own-vae"):
        shutil.copytree(base / "vae", base / "own-vae")
        options["pretrained_vae_model_name_or_path"] = str(base / "own-vae")
    dreambooth.main(tiny_arguments(base, pictures, tmp_path / "run", **options))
    change_field(base / file, name, value)
    fresh_accelerate()
    options["resume_from_checkpoint"] = str(tmp_path / "run" / "checkpoint-1")
    expected = f"checkpoint-1 belongs to a run with another base model configuration {file.removeprefix('own-')}"
    with pytest.raises(ValueError, match=expected):
        dreambooth.main(tiny_arguments(base, pictures, tmp_path / "run", **options))


def test_checkpoint_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    main(make_args(tmp_path / "run"))
    manifest = tmp_path / "run" / "checkpoint-1" / "checkpoint.json"
    fields = json.loads(manifest.read_text())
    del fields["engine"]
    manifest.write_text(json.dumps(fields))
    fresh_accelerate()
    with pytest.raises(ValueError, match=r"checkpoint-1 is of an earlier version, .* finish the run with that version"):
        main(make_args(tmp_path / "run", resume_from_checkpoint=str(manifest.parent)))
