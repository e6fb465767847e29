import gc

import torch
from quality.step_memory import MIB, step_memory_mib
from torch import nn


def test_memory_of_a_small_network_is_counted_by_hand():
    model = nn.Sequential(nn.Linear(1000, 500, bias=False), nn.Tanh(), nn.Linear(500, 20, bias=False))
    model[0].requires_grad_(False)
    x = torch.randn(256, 1000)
    found = step_memory_mib(model, lambda: model(x).sum())
    weights, trained = 1000 * 500 + 500 * 20, 500 * 20
    activations = 256 * 500  # tanh's output, kept by the last layer; no gradient flows further
    expected = 4 * (weights + 3 * trained + activations) / MIB
    assert abs(found - expected) < 0.01 * expected


def test_a_trained_first_layer_keeps_its_input_too():
    model = nn.Sequential(nn.Linear(1000, 500, bias=False), nn.Linear(500, 20, bias=False))
    x = torch.randn(256, 1000)
    all_trained = step_memory_mib(model, lambda: model(x).sum())
    model[0].requires_grad_(False)
    last_trained = step_memory_mib(model, lambda: model(x).sum())
    assert all_trained - last_trained > 4 * (3 * 500_000 + 256 * 1000) / MIB * 0.99


def test_nothing_of_the_counted_step_stays_in_memory() -> None:
    def living() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    def count() -> None:
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        step_memory_mib(model, lambda: model(torch.ones(5, 3)).sum())

    count()
    count()
    before = living()
    count()  # tanh keeps its own output
    assert living() == before
