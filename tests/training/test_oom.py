"""Out of memory: recognised in all its forms, and answered with what is not yet turned on."""

from types import SimpleNamespace

import pytest
import torch

from nara_diffusion.training.oom import OutOfMemory, explain_out_of_memory, is_out_of_memory

HUNGRY = {
    "mixed_precision": None,
    "gradient_checkpointing": False,
    "cache_latents": False,
    "train_batch_size": 4,
    "use_8bit_adam": False,
    "train_text_encoder": True,
    "sample_batch_size": 4,
    "resolution": 1024,
    "rank": 8,
}
FRUGAL = {
    "mixed_precision": "bf16",
    "gradient_checkpointing": True,
    "cache_latents": True,
    "train_batch_size": 1,
    "use_8bit_adam": True,
    "train_text_encoder": False,
    "sample_batch_size": 1,
    "resolution": 512,
    "rank": 4,
}
CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has …\nmore lines")


@pytest.mark.parametrize(
    "error",
    [
        CUDA,
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_every_form_is_recognised(error: Exception) -> None:
    with (
        pytest.raises(OutOfMemory, match="out of memory while encoding images") as caught,
        explain_out_of_memory(SimpleNamespace(**HUNGRY), "encoding images"),
    ):
        raise error
    assert caught.value.__cause__ is error
    assert "\n" not in str(caught.value)


def test_torch_s_own_failure_is_recognised() -> None:
    with (
        pytest.raises(OutOfMemory, match=r"Try, in this order: --mixed_precision bf16; --gradient_checkpointing; "),
        explain_out_of_memory(SimpleNamespace(**HUNGRY)),
    ):
        torch.empty(2**60)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes don't match"), ValueError("out of memory is a word"), KeyError(1)]
)
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, explain_out_of_memory(SimpleNamespace(**HUNGRY)):
        raise error
    assert caught.value is error
    assert not is_out_of_memory(error)


def advice(**changes: object) -> list[str]:
    with pytest.raises(OutOfMemory) as caught, explain_out_of_memory(SimpleNamespace(**{**FRUGAL, **changes})):
        raise CUDA
    return str(caught.value).split("Try, in this order: ")[1].rstrip(".").split("; ")


@pytest.mark.parametrize("name", FRUGAL)
def test_only_what_is_not_done_yet_is_named(name: str) -> None:
    (only,) = advice(**{name: HUNGRY[name]})
    assert f"--{name}" in only or f"--no-{name}" in only


def test_what_the_optimizer_forbids_is_not_named() -> None:
    assert advice(use_8bit_adam=False, optimizer="AdamW") == ["--use_8bit_adam"]
    assert advice(use_8bit_adam=False, optimizer="Prodigy", rank=8) == ["a lower --rank"]


def test_where_all_is_done_a_larger_device_is_named() -> None:
    assert advice() == ["a smaller model, or a larger device"]


def test_arguments_that_a_script_lacks_are_not_named() -> None:
    with (
        pytest.raises(OutOfMemory, match=r"Try, in this order: --gradient_checkpointing\."),
        explain_out_of_memory(SimpleNamespace(gradient_checkpointing=False)),
    ):
        raise CUDA


def test_without_an_error_nothing_happens() -> None:
    with explain_out_of_memory(SimpleNamespace(**HUNGRY)):
        value = torch.ones(2)
    assert value.sum() == 2
