"""Two processes, each at its own λ, get the gradients of one process, those of the core included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from nara_diffusion import noise_level
from tests.helpers.adapted import adapted

KINDS = ("ddp", "fsdp", "fsdp of the PeftModel", "fsdp, checkpointed")
LEVELS = torch.tensor([0.1, 0.9, 0.5, 0.3])
IDS = torch.arange(20).view(4, 5) + 3

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


def make_model() -> PeftModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, use_cache=False
    )
    return adapted(LlamaForCausalLM(config), target_modules=["q_proj", "down_proj"]).train()


def wrap(model: PeftModel, kind: str) -> nn.Module:
    if kind == "ddp":
        return DistributedDataParallel(model)
    root = model.base_model.model
    if kind.endswith("checkpointed"):
        apply_activation_checkpointing(root, check_fn=lambda module: isinstance(module, LlamaDecoderLayer))
    for layer in root.model.layers:
        fully_shard(layer)
    fully_shard(model if kind.endswith("PeftModel") else root)
    return model


def gradients(model: nn.Module, rows: slice) -> dict[str, Tensor]:
    """After two forwards at different λ and one backward pass."""
    loss = torch.zeros(())
    for levels in (LEVELS, LEVELS.flip(0)):
        with noise_level(model, levels[rows]):
            loss = loss + model(input_ids=IDS[rows]).logits.square().mean()
    loss.backward()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            whole = getattr(parameter.grad, "full_tensor", lambda grad=parameter.grad: grad)()
            found[name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "")] = whole
    return found


def worker(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    results = {kind: gradients(wrap(make_model(), kind), slice(rank, None, 2)) for kind in KINDS}
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """What each process found."""
    folder = tmp_path_factory.mktemp("distributed")
    mp.spawn(worker, args=(folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("kind", KINDS)
def test_each_process_has_its_own_level(results: list[dict[str, dict[str, Tensor]]], kind: str) -> None:
    expected = gradients(make_model(), slice(None))
    assert any("nara_core." in name for name in expected)
    for found in results:
        assert found[kind].keys() == expected.keys()
        for name, gradient in expected.items():
            assert (found[kind][name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name
