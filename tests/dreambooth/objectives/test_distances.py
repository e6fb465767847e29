"""Pseudo-Huber losses by their formulas in float64, and in a training step beside min-SNR and a window."""

from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler

from nara_diffusion.dreambooth.objectives import Corrupted, squared_errors, weighted_errors
from nara_diffusion.dreambooth.objectives.distances import Distance
from tests.dreambooth.test_loss import batch_of
from tests.dreambooth.test_windows import adapted, step_of
from tests.helpers.small_pipelines import small_sdxl


def written_out(kind: str, e: torch.Tensor, c: float) -> torch.Tensor:
    e = e.double()
    root = (e**2 + c**2).sqrt() - c
    return {"l2": e**2, "huber": 2 * c * root, "smooth_l1": 2 * root}[kind]


@pytest.mark.parametrize("kind", ["l2", "huber", "smooth_l1"])
@pytest.mark.parametrize("c", [0.03, 0.1, 2.0])
def test_values_and_slopes_are_those_of_the_formula(kind: str, c: float) -> None:
    e = torch.linspace(-7, 5, 301, requires_grad=True)
    values = Distance(kind, c)(e)
    torch.testing.assert_close(values, written_out(kind, e, c).float(), rtol=1e-5, atol=1e-7)
    (slopes,) = torch.autograd.grad(values.sum(), e)
    reference = e.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(written_out(kind, reference, c).sum(), reference)
    torch.testing.assert_close(slopes, expected.float(), rtol=1e-4, atol=1e-5)


def test_they_are_squares_of_small_errors_and_sizes_of_large_ones() -> None:
    small, large = torch.tensor([1e-4, -3e-5]), torch.tensor([300.0, -700.0])
    torch.testing.assert_close(Distance("huber", 0.1)(small), small**2, rtol=1e-5, atol=0)
    torch.testing.assert_close(Distance("smooth_l1", 0.1)(small), small**2 / 0.1, rtol=1e-5, atol=0)
    torch.testing.assert_close(Distance("huber", 0.1)(large), 0.2 * large.abs(), rtol=1e-3, atol=0)
    torch.testing.assert_close(Distance("smooth_l1", 0.1)(large), 2 * large.abs(), rtol=1e-3, atol=0)
    zero = torch.zeros(1, requires_grad=True)
    assert torch.autograd.grad(Distance("huber")(zero).sum(), zero)[0].item() == 0


def test_weights_multiply_means_of_each_sample() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 3, 2, 4, 5, generator=generator)
    batch = Corrupted(target, torch.arange(3), target.bfloat16(), torch.tensor([1.0, 0.25, 3.0]))
    losses = weighted_errors(prediction, batch, Distance("huber", 0.3))
    for i in range(3):
        e = prediction[i] - target[i].bfloat16().float()
        expected = batch.weight[i].item() * written_out("huber", e, 0.3).mean().item()
        assert losses[i].item() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(squared_errors(prediction, batch), weighted_errors(prediction, batch, Distance()))


@pytest.mark.parametrize("kind", ["huber", "smooth_l1"])
def test_a_step_has_them_inside_of_the_window_and_squares_where_the_base_is_held(folder: Path, kind: str) -> None:
    pipe = small_sdxl()
    model = adapted(pipe, "nara")
    batch = batch_of(folder, prior=True)
    squares = step_of(pipe, model)(batch)
    predictions: list[torch.Tensor] = []
    model.register_forward_hook(lambda module, inputs, output: predictions.append(output.detach()))
    step = step_of(pipe, model, distance=Distance(kind, 0.3))
    result = step(batch)
    assert result.split is not None
    assert squares.split is not None
    held = result.split.held
    assert held.any()
    assert not held.all()
    torch.testing.assert_close(result.split.values[held], squares.split.values[held], rtol=0, atol=0)
    alphas = DDPMScheduler.from_config(pipe.scheduler.config).alphas_cumprod.double()
    corrupted = step._corrupt(batch["samples"])
    for row in (~held).nonzero()[:, 0].tolist():
        e = predictions[-1][row] - corrupted.target[row]  # the noise
        snr = (alphas / (1 - alphas))[corrupted.timestep[row]].item()
        expected = min(snr, 5.0) / snr * written_out(kind, e, 0.3).mean().item()
        assert result.split.values[row].item() == pytest.approx(expected, rel=1e-4)
