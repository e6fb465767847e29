"""A run under each of accelerate's engines keeps its adapter in float32, and goes on under that engine and on that base
alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from nara_diffusion.dllm import train as dllm
from nara_diffusion.dreambooth import train as dreambooth
from tests.acceptance._commands import fresh_accelerate
from tests.acceptance._engines import in_two_processes, needs_deepspeed, needs_gloo, refused_in_two_processes
from tests.acceptance._runs import TEXT, image_arguments, image_flags, text_arguments, text_flags
from tests.helpers.small_pipelines import small_sdxl

SHORT: dict[str, Any] = {"max_train_steps": 2, "checkpointing_steps": 1, "checkpoints_total_limit": None}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    yield
    fresh_accelerate()


def flags(folder: Path, **changes: Any) -> dict[str, Any]:
    """Two steps of two samples a process, with dropout, a checkpoint after each."""
    return text_flags(folder) | SHORT | {"train_batch_size": 2, "output_dir": folder / "run"} | changes


def resumed(values: dict[str, Any], step: int = 1) -> dict[str, Any]:
    return values | {"resume_from_checkpoint": values["output_dir"] / f"checkpoint-{step}"}


# ---------------------------------------------------------------- engines


@pytest.mark.slow
@needs_gloo
@needs_deepspeed
def test_zero_2_in_bf16_writes_the_adapter_in_float32(tmp_path: Path) -> None:
    values = flags(tmp_path, mixed_precision="bf16", max_train_steps=4)
    in_two_processes([("zero-2", "dllm.py", values)], tmp_path)
    for folder in ("checkpoint-1", "."):
        saved = load_file(tmp_path / "run" / folder / TEXT)
        assert {str(value.dtype) for value in saved.values()} == {"torch.float32"}
    for name, value in saved.items():  # of the last step: a core moves whole from its third on
        assert "frequencies" in name or (value != value.bfloat16()).any(), f"{name} was rounded to bfloat16"


@pytest.mark.slow
@needs_gloo
@needs_deepspeed
def test_zero_3_in_bf16_trains_all_weights_in_float32(tmp_path: Path) -> None:
    values = flags(tmp_path, mixed_precision="bf16", adapter="full", learning_rate=1e-3)
    in_two_processes([("zero-3", "dllm.py", values)], tmp_path)
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert {str(value.dtype) for value in saved.values()} == {"torch.float32"}
    assert all((value != value.bfloat16()).any() for value in saved.values())


@pytest.mark.slow
@needs_gloo
def test_resume_under_another_engine_is_refused_by_name(tmp_path: Path) -> None:
    values = flags(tmp_path)
    in_two_processes([("ddp", "dllm.py", values)], tmp_path)
    message = "checkpoint-1 was written under one process or DDP and this run is under FSDP2 with SHARDED_STATE_DICT"
    assert message in refused_in_two_processes(("fsdp2", "dllm.py", resumed(values)), tmp_path)


@pytest.mark.slow
@needs_gloo
@needs_deepspeed
@pytest.mark.parametrize(
    ("written", "engine", "changes", "message"),
    [
        ("zero-2", "ddp", {}, "was written under DeepSpeed ZeRO-2 and this run is under one process or DDP"),
        (None, "zero-2", {"mixed_precision": "fp16"}, "mixed_precision is fp16, in which DeepSpeed would round"),
        (None, "zero-2", {"core_start_step": 1}, "core_start_step is 1, but DeepSpeed steps as soon as"),
        ("zero-3", "zero-3", {"other base": True}, "checkpoint-1 belongs to a run with another base model"),
    ],
)
def test_deepspeed_refuses_what_it_would_do_otherwise(
    tmp_path: Path, written: str | None, engine: str, changes: dict[str, Any], message: str
) -> None:
    base = copied_base(tmp_path)
    values = flags(tmp_path, pretrained_model_name_or_path=base)
    if written is not None:
        in_two_processes([(written, "dllm.py", values)], tmp_path)
        values = resumed(values)
    if changes.pop("other base", False):
        change_weights(base)
    assert message in refused_in_two_processes((engine, "dllm.py", values | changes), tmp_path)


# ---------------------------------------------------------------- the base


def copied_base(folder: Path) -> Path:
    shutil.copytree(text_flags(folder)["pretrained_model_name_or_path"], folder / "base")
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
    base = copied_base(tmp_path)
    config = (base / "config.json").read_text()
    options: dict[str, Any] = SHORT | {"pretrained_model_name_or_path": base}
    dllm.main(text_arguments(tmp_path, **options))
    options["resume_from_checkpoint"] = tmp_path / "run" / "checkpoint-1"
    for name, value in (("rope_theta", 20000.0), ("mask_token_id", 282)):
        change_field(base / "config.json", name, value)
        fresh_accelerate()
        with pytest.raises(ValueError, match=r"checkpoint-1 belongs .* another base model configuration config\.json"):
            dllm.main(text_arguments(tmp_path, **options))
        (base / "config.json").write_text(config)
    change_weights(base)
    fresh_accelerate()
    with pytest.raises(ValueError, match=r"checkpoint-1 belongs to a run with another base model: bring it back"):
        dllm.main(text_arguments(tmp_path, **options))


def test_image_run_resumes_only_on_the_configurations_it_began_with(tmp_path: Path) -> None:
    values = image_flags(tmp_path, small_sdxl()) | SHORT | {"curve_points": 1}
    dreambooth.main(image_arguments(values, tmp_path / "run"))
    values["resume_from_checkpoint"] = tmp_path / "run" / "checkpoint-1"
    for file, name, value in (
        ("unet/config.json", "norm_eps", 1e-3),
        ("scheduler/scheduler_config.json", "beta_end", 1),
    ):
        before = (tmp_path / "model" / file).read_text()
        change_field(tmp_path / "model" / file, name, value)
        fresh_accelerate()
        with pytest.raises(ValueError, match=f"belongs to a run with another base model configuration {file}"):
            dreambooth.main(image_arguments(values, tmp_path / "run"))
        (tmp_path / "model" / file).write_text(before)


def test_checkpoint_of_version_0_1_is_refused_by_name(tmp_path: Path) -> None:
    dllm.main(text_arguments(tmp_path, **SHORT))
    manifest = tmp_path / "run" / "checkpoint-1" / "checkpoint.json"
    fields = json.loads(manifest.read_text())
    del fields["format"]
    manifest.write_text(json.dumps(fields))
    fresh_accelerate()
    with pytest.raises(ValueError, match=r"checkpoint-1 is of version 0\.1, .* finish it with version 0\.1"):
        dllm.main(text_arguments(tmp_path, **SHORT, resume_from_checkpoint=manifest.parent))
