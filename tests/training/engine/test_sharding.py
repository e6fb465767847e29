"""Where an engine splits all weights between processes, A, B, W0 and the core among them: layers read whole ones, and a
part of the model that is called by itself, which has nobody to bring the core in, is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from nara_diffusion import noise_level
from nara_diffusion.training.engine.state import prepare, trained_state
from tests.helpers.adapted import adapted
from tests.helpers.engines import HAS_DEEPSPEED, in_two_processes

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
needs_deepspeed = pytest.mark.skipif(not HAS_DEEPSPEED, reason="needs DeepSpeed")

LEVELS = torch.tensor([0.1, 0.9, 0.5, 0.3])
IDS = torch.arange(20).view(4, 5) + 3
STEPS, RATE = 2, 0.5
SPLITTING = [
    pytest.param("fsdp", False, id="fsdp, NaRA"),
    pytest.param("zero-3, all sharded", False, id="zero-3, NaRA", marks=[needs_deepspeed, pytest.mark.slow]),
    pytest.param("zero-3, all sharded", True, id="zero-3, NaRA-DoRA", marks=needs_deepspeed),
]


def make_model(use_dora: bool) -> PeftModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, use_cache=False
    )
    return adapted(LlamaForCausalLM(config), target_modules=["q_proj", "down_proj"], use_dora=use_dora).train()


def loss_of(model: PeftModel, call: PeftModel) -> Tensor:
    with noise_level(model, LEVELS):
        return call(input_ids=IDS).logits.square().mean()


def train_and_call_a_part(run: tuple[Path, bool]) -> None:
    folder, use_dora = run
    accelerator = Accelerator()
    model = make_model(use_dora)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    wrapped, optimizer = prepare(accelerator, model, optimizer)
    inner = accelerator.unwrap_model(wrapped)
    for _ in range(STEPS):
        accelerator.backward(loss_of(inner, wrapped))
        optimizer.step()
        optimizer.zero_grad()
    state = trained_state(accelerator, wrapped)
    if accelerator.is_main_process:
        torch.save({name: value for name, value in state.items() if is_trained(name)}, folder / "state.pt")
    with (
        noise_level(inner, 0.3),
        pytest.raises(ValueError, match=r"The cores are sharded between processes.*: call the whole model"),
    ):
        inner.base_model.model.model(input_ids=IDS)
    accelerator.end_training()


def is_trained(name: str) -> bool:
    return "lora_" in name or ("nara_core" in name and "frequencies" not in name)


def trained_by_one_process(use_dora: bool) -> dict[str, Tensor]:
    model = make_model(use_dora)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    for _ in range(STEPS):
        loss_of(model, model).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value for name, value in model.state_dict().items() if is_trained(name)}


@pytest.mark.parametrize(("engine", "use_dora"), SPLITTING)
def test_training_with_all_weights_split_is_that_of_one_process_and_parts_are_refused(
    engine: str, use_dora: bool, tmp_path: Path
) -> None:
    in_two_processes(train_and_call_a_part, [(engine, (tmp_path, use_dora))])
    found, expected = torch.load(tmp_path / "state.pt"), trained_by_one_process(use_dora)
    start = make_model(use_dora).state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
        assert not torch.equal(value, start[name]), name
