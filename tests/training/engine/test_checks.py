"""An engine that accelerate gives instead of the one that was asked for, or that would ignore arguments, is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.utils import DistributedType

from nara_diffusion.training.engine.checks import check_adapter, check_engine
from nara_diffusion.training.run import start_run


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "2"}, {"MASTER_ADDR": "::1", "ACCELERATE_USE_CPU": "True"}])
def test_processes_that_accelerate_does_not_see_are_refused(small_args, monkeypatch, environment) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"processes were asked for, but accelerate sees 1"):
        start_run(small_args(), "small")


@pytest.mark.parametrize("name", ["FSDP", "DeepSpeed"])
@pytest.mark.parametrize("given", [DistributedType.MULTI_CPU, DistributedType.NO])
def test_check_engine_another_engine_than_asked_for_raises(small_args, monkeypatch, name: str, given: Any) -> None:
    """On CPU accelerate leaves both out without a word, and trains by DDP or in one process."""
    variable = f"ACCELERATE_USE_{name.upper()}"
    monkeypatch.setenv(variable, "true")
    message = rf"{name} was asked for \({variable} is set\), but accelerate gives {given.value} here"
    with pytest.raises(ValueError, match=message):
        check_engine(accelerator(given), small_args())


def test_start_run_fsdp_on_cpu_raises_and_leaves_no_folder(small_args, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ValueError, match=r"FSDP was asked for .*, but accelerate gives NO here"):
        start_run(small_args(), "small")
    assert not Path(small_args().output_dir).exists()


def test_check_engine_fsdp1_raises(small_args) -> None:
    with pytest.raises(ValueError, match=r"FSDP1, which PyTorch gives up: launch with --fsdp_version 2"):
        check_engine(accelerator(DistributedType.FSDP, is_fsdp2=False), small_args())


def test_check_engine_core_start_step_with_deepspeed_raises(small_args) -> None:
    with pytest.raises(ValueError, match=r"core_start_step is 3, but DeepSpeed steps as soon as"):
        check_engine(accelerator(DistributedType.DEEPSPEED, config={}), small_args(core_start_step=3))


def test_check_engine_fp16_with_deepspeed_raises(small_args) -> None:
    engine = accelerator(DistributedType.DEEPSPEED, config={})
    engine.mixed_precision = "fp16"
    with pytest.raises(ValueError, match=r"fp16, in which DeepSpeed would round .*: give --mixed_precision bf16"):
        check_engine(engine, small_args())


@pytest.mark.parametrize("limit", [0.5, None])
def test_check_engine_deepspeed_that_clips_otherwise_raises(small_args, limit: float | None) -> None:
    engine = accelerator(DistributedType.DEEPSPEED, config={"gradient_clipping": 1.0})
    with pytest.raises(ValueError, match=f"gradient_clipping 1.0, and the arguments max_grad_norm {limit}"):
        check_engine(engine, small_args(max_grad_norm=limit))


@pytest.mark.parametrize(("limit", "clipping"), [(0.5, 0.5), (None, 0.0)])
def test_check_engine_deepspeed_clips_by_max_grad_norm(small_args, limit, clipping) -> None:
    for config in ({}, {"gradient_clipping": "auto"}, {"gradient_clipping": clipping}):
        check_engine(accelerator(DistributedType.DEEPSPEED, config=config), small_args(max_grad_norm=limit))
        assert config == {"gradient_clipping": clipping}


@pytest.mark.parametrize("engine", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_check_adapter_adalora_needs_whole_gradients(engine: DistributedType) -> None:
    with pytest.raises(ValueError, match=r"adalora weighs whole gradients .* shards them: launch"):
        check_adapter("adalora", engine, sharded=False)


@pytest.mark.parametrize("engine", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_check_engine_adafactor_needs_whole_matrices(small_args, engine: DistributedType) -> None:
    with pytest.raises(ValueError, match=r"adafactor takes means over .* whole matrices, which \w+ shards: launch"):
        check_engine(accelerator(engine, config={}), small_args(optimizer="adafactor"))
    check_engine(accelerator(DistributedType.MULTI_GPU), small_args(optimizer="adafactor"))


def test_check_adapter_prompts_need_whole_weights() -> None:
    with pytest.raises(ValueError, match=r"prompt_tuning is saved by running .* FSDP shards: launch"):
        check_adapter("prompt_tuning", DistributedType.FSDP, sharded=True)
    check_adapter("prompt_tuning", DistributedType.DEEPSPEED, sharded=False)
    check_adapter("adalora", DistributedType.MULTI_GPU, sharded=False)
    check_adapter("lora", DistributedType.FSDP, sharded=True)


def accelerator(engine: DistributedType, *, config: dict[str, Any] | None = None, is_fsdp2: bool = True) -> Any:
    plugin = SimpleNamespace(zero_stage=2, deepspeed_config=config)
    return SimpleNamespace(
        distributed_type=engine,
        num_processes=1,
        is_fsdp2=is_fsdp2,
        mixed_precision="no",
        state=SimpleNamespace(deepspeed_plugin=plugin),
    )


@pytest.mark.parametrize(("adapter", "stage"), [("adalora", 2), ("prompt_tuning", 3)])
def test_check_engine_adapter_that_deepspeed_shards_raises(small_args, adapter: str, stage: int) -> None:
    engine = accelerator(DistributedType.DEEPSPEED, config={})
    engine.state.deepspeed_plugin.zero_stage = stage
    with pytest.raises(ValueError, match=f"adapter {adapter} .* launch with --multi_gpu"):
        check_engine(engine, small_args(adapter=adapter, lora_alpha=None))
