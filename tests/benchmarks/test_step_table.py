"""The table of biases that benchmark_few_steps.py compares with cores."""

from __future__ import annotations

import torch
from peft import LoraConfig, inject_adapter_in_model
from quality.step_table import StepTable
from torch import nn


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.time = nn.Linear(3, 5), nn.Linear(5, 4)

    def forward(self, x, timestep):
        return self.time(self.first(x).relu())


def test_sample_gets_its_steps_bias_around_an_adapter() -> None:
    model, x = Denoiser(), torch.randn(3, 3)
    table = StepTable(model, ["time"], torch.tensor([999.0, 500.0]))
    nn.init.normal_(table.biases[0])
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["time"], use_dora=True), model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.uniform_(parameter, 0.5, 1)
    expected = model(x, timestep=None) + table.biases[0][[1, 0, 1]]
    table.join(model)
    actual = model(x, timestep=torch.tensor([500.4, 998.0, 500.0]))
    torch.testing.assert_close(actual, expected)
    assert not model.time._forward_hooks
