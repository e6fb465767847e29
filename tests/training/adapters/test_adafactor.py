"""--optimizer adafactor by the formulas of its paper (arXiv 1804.04235), in float64."""

import pytest
import torch
from torch import Tensor, nn

from nara_diffusion.training.optimization import build_optimizer, build_scheduler


class Adapted(nn.Module):
    """A matrix of each group, a convolution's weight, and a vector."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lora_A = nn.Parameter(torch.randn(3, 7))
        self.lora_B = nn.Parameter(torch.randn(5, 3, 2, 4))
        self.magnitude = nn.Parameter(torch.randn(6))
        self.unet = nn.ModuleDict({"nara_core": nn.Linear(2, 3, bias=False)})


def written_out(weight: Tensor, gradients: list[Tensor], rates: list[float], decay: float) -> Tensor:
    """Without momentum and with a given rate ρ_t: β_t = 1 − t^−0.8, U = G / √V̂, U / max(1, RMS U)."""
    rows = columns = squares = torch.zeros(())
    weight = weight.double()
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        g, beta = gradient.double(), 1 - t**-0.8
        power = g**2 + 1e-30
        if g.dim() > 1:
            rows = beta * rows + (1 - beta) * power.mean(-1)
            columns = beta * columns + (1 - beta) * power.mean(-2)
            mean = torch.einsum("...i,...j->...ij", rows, columns) / rows.mean(-1)[..., None, None]
        else:
            mean = squares = beta * squares + (1 - beta) * power
        update = g / mean.sqrt()
        update = update / max(1.0, update.square().mean().sqrt().item())
        weight = weight - rate * decay * weight - rate * update
    return weight


def test_steps_are_those_of_the_formulas_at_each_groups_rate(small_args) -> None:
    args = small_args(
        optimizer="adafactor",
        learning_rate=0.3,
        core_learning_rate=0.05,
        weight_decay=0.1,
        lr_scheduler="linear",
        lr_warmup_steps=0.0,
    )
    model = Adapted()
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = build_optimizer(model, args)
    assert type(optimizer).__name__ == "Adafactor"
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == {"adapter": 0.3, "core": 0.05}
    scheduler = build_scheduler(optimizer, args, 4)
    generator = torch.Generator().manual_seed(1)
    gradients: dict[str, list[Tensor]] = {name: [] for name in start}
    for _ in range(4):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            gradients[name].append(parameter.grad.clone())
        optimizer.step()
        scheduler.step()
    for name, parameter in model.named_parameters():
        peak = 0.05 if "core" in name else 0.3
        expected = written_out(start[name], gradients[name], [peak * (1 - n / 4) for n in range(4)], 0.1)
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-4, atol=1e-5)


def test_its_state_is_a_row_and_a_column_of_each_matrix(small_args) -> None:
    model = Adapted()
    optimizer = build_optimizer(model, small_args(optimizer="adafactor"))
    model.lora_A.grad = torch.ones(3, 7)
    optimizer.step()
    state = optimizer.state[model.lora_A]
    sizes = {name: tuple(value.shape) for name, value in state.items() if torch.is_tensor(value)}
    assert sizes == {"exp_avg_sq_row": (3,), "exp_avg_sq_col": (7,), "RMS": ()}
    assert model.lora_B not in optimizer.state


@pytest.mark.parametrize("name", ["adam_beta1", "adam_beta2", "adam_epsilon"])
def test_what_it_does_not_read_is_refused(small_args, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0.5, which optimizer adafactor doesn't read: leave it out"):
        small_args(optimizer="adafactor", **{name: 0.5})
