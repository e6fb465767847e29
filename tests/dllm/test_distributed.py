"""Two processes at half the batch each get the loss and the gradients of one process at the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import PeftModel, get_peft_model
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from nara_diffusion import NaraConfig
from nara_diffusion.dllm import AnswerCollator, generate, masked_diffusion_loss
from nara_diffusion.noise.window import NoiseWindow

from .conftest import enable_checkpointing

MASK, END = 49, 1
ROWS = [
    {"input_ids": [5, 6, 7, 8, END], "prompt_length": 2, "position": 40},
    {"input_ids": [9, 6, 7, 8, 9, 10, 11, END], "prompt_length": 1, "position": 41},
    {"input_ids": [5, 6, 12, 13, 14, END], "prompt_length": 3, "position": 42},
    {"input_ids": [5, 12, 13, END], "prompt_length": 1, "position": 43},
]
OPTIONS = {"seed": 6, "group_size": 4, "chunk_size": 2}


def make_model(*, adapted: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, use_cache=False
    )
    config.is_causal, config.mask_token_id = False, MASK
    model = LlamaForCausalLM(config)
    if not adapted:
        return model
    nara = NaraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "lm_head"], core_hidden_dims=(8, 8))
    model = get_peft_model(model, nara)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model


def batch_of(rows: list[dict]) -> dict[str, torch.Tensor]:
    return AnswerCollator(END, trained_padding=1)(rows)


KINDS = ("ddp", "ddp-checkpointed", "ddp-held", "fsdp", "fsdp-held")
HOLD = NoiseWindow(0.2, 0.8, hold_weight=2.0)  # one process has no sample outside


def options_of(kind: str) -> dict[str, Any]:
    return OPTIONS | ({"window": HOLD} if kind.endswith("held") else {})


def worker(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    results = {kind: run(rank, kind) for kind in KINDS}
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


def run(rank: int, kind: str) -> list[tuple[torch.Tensor, dict[str, torch.Tensor | None]]]:
    """(loss, gradients) without and with complementary masks."""
    model = make_model(adapted=kind != "fsdp")
    if kind.startswith("fsdp"):
        inner = model.base_model.model if isinstance(model, PeftModel) else model
        for layer in inner.model.layers:
            fully_shard(layer)
        fully_shard(inner.lm_head)
        wrapped = fully_shard(model)
    else:
        if kind == "ddp-checkpointed":
            enable_checkpointing(model, {"use_reentrant": False})
            model.train()
        wrapped = DistributedDataParallel(model)
    results = []
    for complementary in (False, True):
        wrapped.zero_grad()
        loss = masked_diffusion_loss(
            wrapped, **batch_of(ROWS[rank::2]), **options_of(kind), complementary=complementary
        ).loss
        loss.backward()
        dist.all_reduce(loss := loss.detach())
        gradients = {name: _whole(p.grad) for name, p in model.named_parameters() if p.requires_grad}
        results.append((loss / 2, gradients))
    if kind == "ddp":  # processes that need different numbers of forwards don't wait for each other
        generate(wrapped, torch.tensor([[5, 6, 7]]), gen_length=2 + 4 * rank)
    return results


def _whole(gradient: torch.Tensor | None) -> torch.Tensor | None:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    folder = tmp_path_factory.mktemp("distributed")
    mp.spawn(worker, args=(folder,), nprocs=2)
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(results: dict[str, list], kind: str) -> None:
    model = make_model(adapted=kind != "fsdp")
    assert isinstance(model, PeftModel) == (kind != "fsdp")
    for complementary, (loss, gradients) in zip((False, True), results[kind], strict=True):
        model.zero_grad()
        expected = masked_diffusion_loss(model, **batch_of(ROWS), **options_of(kind), complementary=complementary).loss
        expected.backward()
        assert torch.allclose(loss, expected.detach(), rtol=1e-5)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                difference = (gradients[name] - parameter.grad).abs().max()
                assert difference <= 2e-5 * parameter.grad.abs().max(), name
