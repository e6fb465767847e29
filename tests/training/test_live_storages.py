"""The counter of live storages, and the conversion of a model into fake tensors."""

from __future__ import annotations

import gc

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from nara_diffusion.training.planned_step import StepCounter, nbytes, tensors_of, to_fake


def test_live_and_peak_follow_each_storages_life():
    weight = torch.zeros(5, 7)
    with StepCounter([weight]) as counter:
        assert weight.t().shape == (7, 5)  # a view of what exists
        first = torch.zeros(100)  # 400 bytes
        view = first[:10].view(2, 5)
        second = torch.zeros(30, dtype=torch.float64)  # 240 bytes
        assert (counter.live, counter.peak) == (640, 640)
        del first
        assert counter.live == 640  # the view keeps it
        del view
        assert (counter.live, counter.peak) == (240, 640)
        second.add_(1)
        assert (counter.live, counter.peak) == (240, 640)
        counter.peak = 0
        first = second * 2
        assert counter.peak == 480
        del first, second
    assert counter.live == 0


class Tied(nn.Module):
    """Two uses of one weight, a norm with buffers, and attention."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 24), nn.Linear(24, 50, bias=False)
        self.head.weight = self.embedding.weight
        self.mix, self.norm = nn.Linear(24, 72), nn.BatchNorm1d(24)
        self.mix.weight.requires_grad_(False)

    def forward(self, tokens):
        hidden = self.norm(self.embedding(tokens).transpose(1, 2)).transpose(1, 2)
        parts = self.mix(hidden).unflatten(-1, (3, 2, 12)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*parts)
        return self.head(mixed.transpose(1, 2).flatten(2))


def step(model):
    tokens = torch.zeros(6, 33, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16):
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.flatten())
    loss.backward()


def test_fake_tensors_count_as_real_without_data():
    model = Tied()
    with StepCounter(tensors_of(model)) as real:
        step(model)
    live_bytes = real.live
    with torch.device("meta"):
        model = Tied()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    to_fake(model, mode)
    assert model.head.weight is model.embedding.weight
    assert isinstance(model.embedding.weight, FakeTensor)
    assert isinstance(model.norm.running_mean, FakeTensor)
    assert [p.requires_grad for p in model.mix.parameters()] == [False, True]
    assert nbytes(tensors_of(model)) == nbytes(tensors_of(Tied()))
    with mode, StepCounter(tensors_of(model)) as fake:
        step(model)
    gc.collect()
    assert (fake.live, fake.peak) == (live_bytes, real.peak)
    gradients = nbytes(p.grad for p in model.parameters() if p.grad is not None)
    assert fake.live == gradients > 0
