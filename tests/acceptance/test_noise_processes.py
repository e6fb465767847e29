"""Two processes, each with the λ of its own samples, train as one process does with all: DDP, and FSDP2.

They run on CPU, by gloo.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from nara_diffusion import noise_level
from tests.helpers.rounding import rounding_of

from ._noise_models import adapt, distance

KINDS = ("ddp", "fsdp2", "fsdp2 of the PeftModel")
LEVELS = torch.tensor([0.1, 0.9, 0.5, 0.3])
IDS = torch.arange(20).view(4, 5) + 3

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")]


def made() -> Any:
    config = LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, use_cache=False
    )
    torch.manual_seed(0)
    model, _ = adapt(LlamaForCausalLM(config), ["q_proj", "down_proj"])
    return model.train()


def wrapped(model: Any, kind: str) -> nn.Module:
    if kind == "ddp":
        return DistributedDataParallel(model)
    root = model.base_model.model
    for layer in root.model.layers:
        fully_shard(layer)
    fully_shard(model if kind.endswith("PeftModel") else root)
    return model


def trained(model: nn.Module, rows: slice) -> dict[str, dict[str, Tensor]]:
    """Gradients and weights of the adapter after a step that saw two forwards at different λ."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    loss = torch.zeros(())
    for levels in (LEVELS, LEVELS.flip(0)):
        with noise_level(model, levels[rows]):
            loss = loss + model(input_ids=IDS[rows]).logits.square().mean()
    loss.backward()
    gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
    weights = get_model_state_dict(model, options=options)
    return {"gradients": unwrapped(gradients), "weights": unwrapped(weights)}


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    results = {kind: trained(wrapped(made(), kind), slice(rank, None, 2)) for kind in KINDS}
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, dict[str, Tensor]]]]:
    """What each process has in the end."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(work, args=(folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_as_one_with_the_level_of_each_sample(results: Any, kind: str) -> None:
    model = made()
    expected = trained(model, slice(None))
    assert any("core" in name for name in expected["gradients"])
    bound = 2 * rounding_of(model)
    for found in results:
        gradients = found[kind]["gradients"]
        assert gradients.keys() == expected["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            assert distance(gradients[name], gradient) < bound, name
        for name, weight in expected["weights"].items():
            assert distance(found[kind]["weights"][name], weight) < bound, name
