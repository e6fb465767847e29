"""Losses by thirds of λ, and the lines of metrics.jsonl."""

import json

import pytest
import torch
from accelerate import Accelerator

from nara_diffusion.noise.window import EVERYTHING, NoiseWindow
from nara_diffusion.training.base_hold import SplitLosses
from nara_diffusion.training.metrics import LossWindow, MetricLog, window_means


def test_losses_are_averaged_by_thirds_of_the_noise_level() -> None:
    window = LossWindow()
    window.add(torch.tensor([1.0, 2.0, 8.0]), torch.tensor([0.1, 0.3, 0.5]))
    window.add(torch.tensor([4.0, 5.0]), torch.tensor([0.7, 1.0]))
    assert window.means() == {"loss": 4.0, "loss_low": 1.5, "loss_mid": 8.0, "loss_high": 4.5}
    window.add(torch.tensor([3.0]), torch.tensor([0.9]))
    assert window.means() == {"loss": 3.0, "loss_high": 3.0}


def test_loss_that_is_split_has_its_parts_and_thirds_of_what_lies_inside() -> None:
    window = LossWindow()
    values, levels = torch.tensor([1.0, 2.0, 8.0, 5.0]), torch.tensor([0.1, 0.3, 0.5, 0.9])
    held = torch.tensor([True, False, False, True])
    window.add(torch.tensor([10.0, 20.0]), torch.tensor([0.1, 0.3]), SplitLosses(values, levels, held))
    window.add(torch.tensor([3.0]), torch.tensor([0.6]), SplitLosses(values[:1], levels[2:3], held[1:2]))
    expected = {"loss": 11.0, "loss_inside": 11 / 3, "distance_outside": 3.0, "loss_low": 2.0, "loss_mid": 4.5}
    assert window.means() == pytest.approx(expected)
    assert SplitLosses(values, levels, held).weighted(2.0).tolist() == [2.0, 2.0, 8.0, 10.0]


def test_window_means_are_of_both_sides() -> None:
    losses, levels = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.2, 0.5, 0.9])
    assert window_means(losses, levels, NoiseWindow(0.5, 1.0)) == {"loss_inside": 4.0, "loss_outside": 1.0}
    assert window_means(losses, levels, NoiseWindow(0.6, 0.8)) == {"loss_outside": 3.0}
    assert window_means(losses, levels, EVERYTHING) == {}


def test_a_resumed_run_forgets_the_steps_that_it_takes_again(tmp_path) -> None:
    accelerator = Accelerator(cpu=True)
    log = MetricLog(accelerator, tmp_path, first_step=0)
    for step in (10, 20, 30):
        log.write(step, {"loss": step / 10})
    log = MetricLog(accelerator, tmp_path, first_step=20)
    log.write(30, {"loss": 7.0})
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert lines == [{"step": 10, "loss": 1.0}, {"step": 20, "loss": 2.0}, {"step": 30, "loss": 7.0}]


@pytest.mark.parametrize(("level", "name"), [(1 / 3 - 1e-6, "loss_low"), (0.34, "loss_mid"), (0.67, "loss_high")])
def test_edges_of_the_thirds(level: float, name: str) -> None:
    window = LossWindow()
    window.add(torch.tensor([1.0]), torch.tensor([level]))
    assert set(window.means()) == {"loss", name}


@pytest.mark.parametrize("cut", [b'{"step": 20, "lo', b'{"step": 20, "text": "\xe2\x82', b"[1]", b"7"])
def test_a_line_that_a_killed_run_left_half_written_is_forgotten(tmp_path, cut: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 10, "loss": 1.0}\n' + cut)
    log = MetricLog(Accelerator(cpu=True), tmp_path, first_step=20)
    log.write(20, {"loss": 2.0})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": 10, "loss": 1.0}, {"step": 20, "loss": 2.0}]
