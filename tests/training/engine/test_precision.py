"""The core is float32 under FSDP's mixed precision too, which would round its weights on their way to each process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor

from nara_diffusion import noise_level
from nara_diffusion.training.engine.state import prepare
from tests.helpers.engines import in_two_processes
from tests.runtime.test_distributed import make_model

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

LEVELS = torch.tensor([0.1, 0.9])
IDS = torch.arange(10).view(2, 5) + 3


def cores_of(model: PeftModel, call: PeftModel) -> tuple[Tensor, torch.dtype]:
    """C (2, r, r) as the layers of a forward read it, and the dtype of a frozen layer's output."""
    seen, dtypes = [], []
    root = model.base_model.model
    (core,) = root.nara_core.cores["default"].values()
    core.register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
    root.model.layers[0].self_attn.k_proj.register_forward_hook(
        lambda module, args, output: dtypes.append(output.dtype)
    )
    with noise_level(model, LEVELS):
        call(input_ids=IDS)
    return seen[0], dtypes[0]


def work(folder: Path) -> None:
    accelerator = Accelerator(mixed_precision="bf16")
    model = make_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    wrapped, _ = prepare(accelerator, model, optimizer)
    torch.save(cores_of(accelerator.unwrap_model(wrapped), wrapped), folder / f"{accelerator.process_index}.pt")
    accelerator.end_training()


@pytest.mark.parametrize("engine", ["fsdp"])
def test_core_under_mixed_precision_is_computed_in_float32(engine: str, tmp_path: Path) -> None:
    in_two_processes(work, [(engine, tmp_path)])
    expected, _ = cores_of(model := make_model(), model)
    for rank in range(2):
        found, dtype = torch.load(tmp_path / f"{rank}.pt")
        assert dtype == torch.bfloat16
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
