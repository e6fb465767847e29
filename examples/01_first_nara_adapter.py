"""A first adapter: NaRA on a diffusion model of your own, where you say the noise level yourself.

    python examples/01_first_nara_adapter.py

A small network learns to turn noise into points on a ring (a rectified flow in two dimensions). A NaRA adapter then
teaches it a spiral; the network's own weights stay as they are. What every use has in common is here: wrap the
model with PEFT, run it inside `noise_level(model, ...)`, look at the core C(λ), save, load. Takes half a minute and
draws outputs/examples/01_first_nara_adapter.png.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from peft import PeftModel, get_peft_model
from torch import nn

from nara_diffusion import NaraConfig, core_matrix, noise_level

LAYERS = ["hidden1", "hidden2", "hidden3", "out"]


class PointDenoiser(nn.Module):
    """Predicts the velocity ε − x0 from x_λ = (1 − λ) x0 + λ ε: x (b, 2), λ (b,) -> (b, 2)."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.hidden1 = nn.Linear(2 + 8, width)
        self.hidden2 = nn.Linear(width, width)
        self.hidden3 = nn.Linear(width, width)
        self.out = nn.Linear(width, 2)
        self.register_buffer("frequencies", math.pi * torch.arange(1, 5))

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        angles = time[:, None] * self.frequencies  # (b, 4)
        h = torch.cat([x, angles.sin(), angles.cos()], dim=1)  # (b, 10)
        for layer in (self.hidden1, self.hidden2, self.hidden3):
            h = nn.functional.silu(layer(h))  # (b, width)
        return self.out(h)


def ring(n: int) -> torch.Tensor:
    angle = 2 * math.pi * torch.rand(n)
    return torch.stack([angle.cos(), angle.sin()], dim=1) + 0.05 * torch.randn(n, 2)


def spiral(n: int) -> torch.Tensor:
    turn = torch.rand(n).sqrt()  # (n,) even along the arm
    angle = 3 * math.pi * turn
    return 1.5 * turn[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1) + 0.05 * torch.randn(n, 2)


def velocity(model: nn.Module, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """The model's prediction. An adapted model gets λ, one value a sample; the bare one takes none."""
    if not isinstance(model, PeftModel):
        return model(x, time)
    with noise_level(model, time):
        return model(x, time)


def train(model: nn.Module, data: Callable[[int], torch.Tensor], optimizer: torch.optim.Optimizer, steps: int) -> None:
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    for _ in range(steps):
        points, noise, time = data(256), torch.randn(256, 2), torch.rand(256)
        noisy = torch.lerp(points, noise, time[:, None])
        loss = (velocity(model, noisy, time) - (noise - points)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def sample(model: nn.Module, n: int = 1000, steps: int = 50) -> torch.Tensor:
    """Euler's method from noise (λ = 1) to points (λ = 0), from the same noise for every model."""
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(1))
    for step in range(steps, 0, -1):
        x = x - velocity(model, x, torch.full((n,), step / steps)) / steps
    return x


def distance(points: torch.Tensor, target: torch.Tensor) -> float:
    """Chamfer distance: mean way from a point of either set to the nearest of the other."""
    between = torch.cdist(points, target)
    return (between.min(0).values.mean() + between.min(1).values.mean()).item() / 2


def draw(file: Path, clouds: dict[str, torch.Tensor], levels: torch.Tensor, deviation: torch.Tensor) -> None:
    figure = Figure(figsize=(4 * (len(clouds) + 1), 4), layout="constrained")
    axes = figure.subplots(1, len(clouds) + 1)
    for axis, (title, points) in zip(axes, clouds.items(), strict=False):
        axis.scatter(*points.T, s=3)
        axis.set(title=title, xlim=(-2, 2), ylim=(-2, 2), aspect="equal")
    axes[-1].plot(levels, deviation)
    axes[-1].set(title="what the core does", xlabel="noise level λ", ylabel="‖C(λ) − I‖")
    figure.savefig(file, dpi=100)


def main(steps: int = 2000, output_dir: str | Path = "outputs/examples") -> dict[str, float]:
    """Train, adapt, save, load, draw; returns the distances to the spiral before and after."""
    torch.manual_seed(0)
    base = PointDenoiser()
    train(base, ring, torch.optim.AdamW(base.parameters(), lr=3e-3), steps)
    base_sample = sample(base)

    # PEFT's own call; r, lora_alpha, target_modules and the rest mean what they mean for LoRA.
    # The core's default widths are meant for large models: a network of 128 channels gets a smaller one.
    config = NaraConfig(r=8, lora_alpha=8, target_modules=LAYERS, core_hidden_dims=(64, 64))
    model = get_peft_model(base, config)
    model.print_trainable_parameters()
    core = [p for name, p in model.named_parameters() if "lora_core." in name]
    factors = [p for name, p in model.named_parameters() if "lora_A." in name or "lora_B." in name]
    groups = [{"params": factors, "lr": 1e-2}, {"params": core, "lr": 1e-3}]  # the core wants a smaller step
    train(model, spiral, torch.optim.AdamW(groups), steps)
    adapted_sample = sample(model)

    folder = Path(output_dir) / "01_first_nara_adapter"
    model.save_pretrained(folder)
    with model.disable_adapter():
        restored = sample(model)  # the base model is still in there
    loaded = PeftModel.from_pretrained(model.unload(), folder)
    again = sample(loaded)

    levels = torch.linspace(0, 1, 101)
    deviation = (core_matrix(loaded, levels) - torch.eye(8)).flatten(1).norm(dim=1).detach()  # (101,)
    target = spiral(1000)
    results = {"before": distance(base_sample, target), "after": distance(adapted_sample, target)}
    print(f"distance to the spiral: {results['before']:.3f} before, {results['after']:.3f} with the adapter")
    print(f"switched off, it gives the ring again: {torch.equal(base_sample, restored)}")
    print(f"saved and loaded, it gives the same points: {torch.allclose(adapted_sample, again, atol=1e-5)}")
    clouds = {"base model": base_sample, "with NaRA": adapted_sample, "the data": target}
    draw(folder.with_suffix(".png"), clouds, levels, deviation)
    print(f"drawn in {folder.with_suffix('.png')}")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Adapt a small diffusion model of points with NaRA.")
    parser.add_argument("--steps", type=int, default=2000, help="train steps of base model and adapter (default: 2000)")
    parser.add_argument("--output_dir", default="outputs/examples", help="where adapter and picture go")
    arguments = parser.parse_args()
    main(steps=arguments.steps, output_dir=arguments.output_dir)
