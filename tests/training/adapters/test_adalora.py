"""AdaLoRA's penalty is PEFT's, its budget reaches the target, and what it has learnt survives a checkpoint."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from nara_diffusion.training.adapters.adalora import (
    adalora_models,
    allocate_ranks,
    allocator_state,
    load_allocator_state,
    orthogonality,
)
from nara_diffusion.training.adapters.build import build_adapter


@pytest.fixture
def adapted(tiny_llama, small_args):
    """Starts with 5 directions a layer, 3 of which are to stay, from step 1 to step 6 of 8."""
    options = ["init_r=5", "tinit=1", "tfinal=2", "deltaT=1", "orth_reg_weight=0.3"]
    args = small_args(adapter="adalora", adapter_options=options, core_hidden_dims=[256, 512])
    torch.manual_seed(5)
    model = build_adapter(tiny_llama, args, total_steps=8)
    for name, parameter in model.named_parameters():
        if "lora_" in name and parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()  # without dropout


def step(model: torch.nn.Module, number: int, skipped: bool = False) -> None:
    ids = torch.randint(1, 49, (2, 7), generator=torch.Generator().manual_seed(number))
    model.zero_grad()
    model(ids).logits.square().mean().backward()
    if skipped:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.fill_(torch.inf)
    allocate_ranks(adalora_models(model), number, skipped)


def kept(model: torch.nn.Module) -> int:
    return sum(int((value != 0).sum()) for name, value in model.named_parameters() if "lora_E" in name)


def test_the_penalty_is_what_peft_adds_to_a_loss_from_labels(adapted) -> None:
    ids = torch.randint(1, 49, (2, 7))
    with_penalty = adapted.base_model(ids, labels=ids).loss
    plain = adapted.get_base_model()(ids, labels=ids).loss
    found = orthogonality(adalora_models(adapted))
    torch.testing.assert_close(found, with_penalty - plain, rtol=1e-5, atol=1e-5)
    found.backward()
    assert all(p.grad.abs().sum() > 0 for name, p in adapted.named_parameters() if "lora_A" in name or "lora_B" in name)


def test_models_without_adalora_have_no_penalty_and_no_budget(tiny_llama) -> None:
    assert orthogonality(adalora_models(tiny_llama)) == 0.0
    allocate_ranks([], 3)
    assert allocator_state([]) == {}


def test_the_budget_goes_from_the_first_rank_to_the_target(adapted) -> None:
    layers = sum("lora_E" in name for name, _ in adapted.named_parameters())
    counts = []
    for number in range(1, 9):
        step(adapted, number)
        counts.append(kept(adapted))
    assert counts[0] == 5 * layers
    assert counts[-1] == 3 * layers
    assert counts == sorted(counts, reverse=True)


def test_gradients_that_overflowed_leave_the_importance_finite(adapted) -> None:
    step(adapted, 1)
    step(adapted, 2, skipped=True)
    assert all(value.isfinite().all() for value in allocator_state(adalora_models(adapted)).values())


def test_importance_and_dropped_directions_survive_a_file(adapted, tmp_path) -> None:
    tuners = adalora_models(adapted)
    for number in (1, 2, 3):
        step(adapted, number)
    state = allocator_state(tuners)
    assert {key.split(".")[2] for key in state} == {"exp_avg_ipt", "exp_avg_unc", "rank_pattern"}
    save_file(state, tmp_path / "state.safetensors")
    weights = {name: value.clone() for name, value in adapted.state_dict().items()}
    step(adapted, 4)
    expected = allocator_state(tuners)

    adapted.load_state_dict(weights)
    tuners[0].rankallocator.reset_ipt()
    tuners[0].peft_config["default"].rank_pattern = None
    load_allocator_state(tuners, load_file(tmp_path / "state.safetensors"))
    step(adapted, 4)
    for key, value in allocator_state(tuners).items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=0)
