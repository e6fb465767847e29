"""dllm.py in two processes, under DDP, FSDP2 and DeepSpeed: the trained adapter is that of one process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from nara_diffusion import noise_level
from nara_diffusion.dllm import load_backbone
from tests.acceptance._commands import LAST_RESORT, ROOT, metrics, results, run, tensors, words
from tests.acceptance._engines import in_two_processes, needs_deepspeed, needs_gloo, refused_in_two_processes
from tests.acceptance._runs import image_flags, text_flags
from tests.helpers.small_pipelines import small_sdxl

pytestmark = [pytest.mark.slow, needs_gloo]

TWO: dict[str, Any] = {"train_batch_size": 2}
BF16: dict[str, Any] = {"mixed_precision": "bf16"}


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Without dropout, whose draws are those of a process."""
    return text_flags(tmp_path_factory.mktemp("data")) | {"lora_dropout": 0.0, "max_train_steps": 4}


@pytest.fixture(scope="module")
def one(flags: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{precision: the folder of a run of one process}."""
    folders = {}
    for name, changes in (("no", {}), ("bf16", BF16)):
        folders[name] = tmp_path_factory.mktemp(name) / "out"
        run("dllm.py", **flags, **changes, output_dir=folders[name])
    return folders


def deviation(found: Path, expected: Path, start: Path) -> float:
    """How far two adapters are apart, of how far training has moved from its first checkpoint."""
    mine, theirs, first = tensors(found), tensors(expected), tensors(start / "checkpoint-2")
    assert mine.keys() == theirs.keys()
    assert all(value.dtype == torch.float32 and value.shape == theirs[name].shape for name, value in mine.items())
    apart = sum(float((mine[name] - theirs[name]).square().sum()) for name in mine)
    moved = sum(float((first[name] - theirs[name]).square().sum()) for name in mine)
    assert moved > 0
    return (apart / moved) ** 0.5


def check_loads(folder: Path, flags: dict[str, Any]) -> None:
    """By PEFT, in one process: another prediction than the base's, of another λ than at another."""
    base = load_backbone(str(flags["pretrained_model_name_or_path"]))[0]
    ids = torch.tensor([[65, 70, 283, 283, 80, 283]])
    with torch.no_grad():
        plain = base(ids).logits
        model = PeftModel.from_pretrained(base, folder)
        found = []
        for level in (0.1, 0.9):
            with noise_level(model, level):
                found.append(model(ids).logits)
    assert all((logits - plain).abs().max() > 1e-3 for logits in found)
    assert (found[0] - found[1]).abs().max() > 1e-6


def test_launched_run_in_two_processes_is_that_of_one(
    flags: dict[str, Any], one: dict[str, Path], tmp_path: Path
) -> None:
    """By `accelerate launch`; of one global batch, the losses, weights and figures."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--main_process_port", "0", str(ROOT / "train_scripts" / "dllm.py")]
    command += words(**{**flags, **TWO}, output_dir=tmp_path / "two")
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=LAST_RESORT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert deviation(tmp_path / "two", one["no"], one["no"]) < 1e-3
    for mine, theirs in zip(metrics(tmp_path / "two"), metrics(one["no"]), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    found, expected = (results(folder) | {"seconds": 0} for folder in (tmp_path / "two", one["no"]))
    assert found.keys() == expected.keys()
    for name in ("n", "exact_match_after", "curve_before", "curve_after", "validation_loss_after"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name


def check_leaves_the_base_out(checkpoint: Path, flags: dict[str, Any]) -> None:
    """By bytes that occur in no other file: a row of the base's embedding."""
    row = load_backbone(str(flags["pretrained_model_name_or_path"]))[0].get_input_embeddings().weight[70].detach()
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    contents = [value.view(torch.uint8).numpy().tobytes() for value in (row, row.bfloat16())]
    assert files
    assert not [path.name for path in files for content in contents if content in path.read_bytes()]


TORCH = [("ddp", "bf16"), ("fsdp2", "no"), ("fsdp2", "bf16")]
"""(engine, precision)."""


@pytest.fixture(scope="module")
def folders(flags: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Path]:
    """Of each of TORCH, and of an image run, which is `resumed` from its middle, too."""
    place = tmp_path_factory.mktemp("engines")
    of: dict[Any, Path] = {kind: place / "-".join(kind) for kind in TORCH} | {"images": place / "images"}
    images = image_flags(place, small_sdxl()) | {"max_train_steps": 4, "snr_gamma": 5.0, "caption_dropout": 0.3}
    run("dreambooth_sdxl.py", **{**images, "train_batch_size": 4}, output_dir=place / "one")
    resumed = {"output_dir": place / "resumed", "resume_from_checkpoint": place / "images" / "checkpoint-2"}
    commands = [
        (engine, "dllm.py", flags | TWO | {"mixed_precision": precision, "output_dir": of[engine, precision]})
        for engine, precision in TORCH
    ]
    commands += [("ddp", "dreambooth_sdxl.py", images | {"output_dir": place / "images"})]
    in_two_processes([*commands, ("ddp", "dreambooth_sdxl.py", images | resumed)], place)
    return of


@pytest.mark.parametrize("kind", TORCH, ids="-".join)
def test_run_under_torch_s_engines_trains_the_adapter_of_one_process(
    flags: dict[str, Any], one: dict[str, Path], folders: dict[Any, Path], kind: tuple[str, str]
) -> None:
    """(tests/training/test_engines.py has what of them is killed and resumes to the same bits.)"""
    assert deviation(folders[kind], one[kind[1]], one[kind[1]]) < (0.3 if kind[1] == "bf16" else 1e-3)
    if kind == ("fsdp2", "bf16"):  # of the same samples a process
        assert deviation(folders[kind], folders["ddp", "bf16"], one["bf16"]) < 1e-2
    check_loads(folders[kind], flags)
    check_leaves_the_base_out(folders[kind] / "checkpoint-2", flags)


def test_image_run_in_two_processes_is_that_of_one_and_resumes_to_the_same_bits(folders: dict[Any, Path]) -> None:
    whole, one, resumed = (folders["images"].with_name(name) for name in ("images", "one", "resumed"))
    assert deviation(whole, one, one) < 1e-3
    mine, theirs = tensors(resumed), tensors(whole)
    assert mine.keys() == theirs.keys() != set()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert [line["loss"] for line in metrics(resumed)][-2:] == [line["loss"] for line in metrics(whole)][-2:]


@needs_deepspeed
@pytest.mark.parametrize("engine", ["zero-2", "zero-3"])
def test_run_under_deepspeed_trains_the_adapter_of_one_process(
    flags: dict[str, Any], one: dict[str, Path], tmp_path: Path, engine: str
) -> None:
    whole, options = tmp_path / "whole", flags | TWO | BF16
    in_two_processes([(engine, "dllm.py", options | {"output_dir": whole})], tmp_path)
    assert deviation(whole, one["bf16"], one["bf16"]) < 0.3
    for name, value in tensors(whole).items():
        assert "frequencies" in name or (value != value.bfloat16()).any(), f"{name} was rounded to bfloat16"
    check_loads(whole, flags)
    check_leaves_the_base_out(whole / "checkpoint-2", flags)


@needs_deepspeed
def test_zero_3_in_bf16_trains_all_weights_in_float32(flags: dict[str, Any], tmp_path: Path) -> None:
    full = {"adapter": "full", "learning_rate": 1e-3, "core_learning_rate": None, "adapter_options": {}}
    options = flags | TWO | BF16 | full | {"lora_alpha": None, "max_train_steps": 2, "output_dir": tmp_path / "run"}
    in_two_processes([("zero-3", "dllm.py", options)], tmp_path)
    saved = tensors(tmp_path / "run")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert all((value != value.bfloat16()).any() for value in saved.values())


@pytest.mark.parametrize(
    ("written", "engine", "changes", "message"),
    [
        (
            "ddp",
            "fsdp2",
            {},
            "was written under one process or DDP and this run is under FSDP2 with SHARDED_STATE_DICT",
        ),
        ("zero-2", "ddp", {}, "was written under DeepSpeed ZeRO-2 and this run is under one process or DDP"),
        (None, "zero-2", {"mixed_precision": "fp16"}, "mixed_precision is fp16, in which DeepSpeed would round"),
        (None, "zero-2", {"core_start_step": 1}, "core_start_step is 1, but DeepSpeed steps as soon as"),
        ("zero-3", "zero-3", {"other base": True}, "checkpoint-1 belongs to a run with another base model"),
    ],
)
def test_engine_refuses_by_name_what_it_would_do_otherwise(
    flags: dict[str, Any], tmp_path: Path, written: str | None, engine: str, changes: dict[str, Any], message: str
) -> None:
    if "zero" in f"{written} {engine}":
        pytest.importorskip("deepspeed")
    base = shutil.copytree(flags["pretrained_model_name_or_path"], tmp_path / "base")
    values = flags | TWO | {"pretrained_model_name_or_path": base, "output_dir": tmp_path / "run"}
    values |= {"max_train_steps": 2, "checkpointing_steps": 1, "checkpoints_total_limit": None}
    if written is not None:
        in_two_processes([(written, "dllm.py", values)], tmp_path)
        values |= {"resume_from_checkpoint": tmp_path / "run" / "checkpoint-1"}
    if changes.pop("other base", False):
        weights = load_file(base / "model.safetensors")
        weights["model.transformer.blocks.1.q_proj.weight"][3, 5] += 1e-3
        save_file(weights, base / "model.safetensors")
    assert message in refused_in_two_processes((engine, "dllm.py", values | changes), tmp_path)
