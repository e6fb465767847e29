"""Layers whose rows are known to be no samples: several λ are refused, though there are as many rows by chance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2MoeConfig, Qwen2MoeModel, T5Config, T5EncoderModel

from nara_diffusion import noise_level
from tests.helpers.adapted import adapted, relative_error

LENGTH = 4
"""Of the batch and of its texts."""

LEVELS = torch.tensor([0.05, 0.4, 0.6, 0.93])
IDS = torch.randint(3, 40, (LENGTH, LENGTH), generator=torch.Generator().manual_seed(0))


class LengthFirst(nn.Module):
    """PyTorch's own layers, which see (l, b, d) by default."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(16, 2, 24, batch_first=batch_first, dropout=0.0)
        self.batch_first = batch_first

    def forward(self, input_ids: Tensor) -> Tensor:
        x = torch.nn.functional.one_hot(input_ids % 16, 16).float()  # (b, l, 16)
        return self.encoder(x) if self.batch_first else self.encoder(x.transpose(0, 1)).transpose(0, 1)


class Positions(nn.Module):
    """Positions that are looked up without a batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(49, 16), nn.Embedding(9, 16)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1]))


class Experts(nn.Module):
    """Each token goes to the expert of its id."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])

    def forward(self, input_ids: Tensor) -> Tensor:
        x = torch.nn.functional.one_hot(input_ids % 16, 16).float()
        output = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            chosen = input_ids % 3 == index
            output[chosen] = expert(x[chosen])
        return output


MODELS: dict[str, tuple[Callable[[], Any], list[str], str]] = {
    "PyTorch": (lambda: LengthFirst(False), ["linear1"], "positions"),
    "an embedding of positions": (Positions, ["positions"], "the batch inside layer .*positions' is 1"),
    "experts": (Experts, ["0", "1", "2"], "tokens"),
    "Qwen2Moe": (
        lambda: Qwen2MoeModel(
            Qwen2MoeConfig(
                vocab_size=49, hidden_size=16, intermediate_size=24, moe_intermediate_size=12, num_hidden_layers=1,
                shared_expert_intermediate_size=20, num_attention_heads=2, num_key_value_heads=1, num_experts=4,
                decoder_sparse_step=1,
            )
        ),
        ["shared_expert_gate"],
        "tokens",
    ),
    "T5's positions": (
        lambda: T5EncoderModel(T5Config(vocab_size=49, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=3)),
        ["relative_attention_bias"],
        "positions",
    ),
}  # fmt: skip


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found = model(input_ids=IDS)
    return found if isinstance(found, Tensor) else found[0]


@pytest.mark.parametrize("name", MODELS)
def test_rows_that_are_known_to_be_no_samples_refuse_several_levels(name: str) -> None:
    make, targets, said = MODELS[name]
    torch.manual_seed(0)
    model = adapted(make(), target_modules=targets)
    with noise_level(model, LEVELS), pytest.raises(ValueError, match=said):
        output(model)
    with noise_level(model, 0.3):
        shared = output(model)
    with model.disable_adapter():
        assert relative_error(output(model), shared) > 1e-4


def test_rows_that_are_samples_have_a_level_each() -> None:
    model = adapted(LengthFirst(True), target_modules=["linear1", "linear2"])
    with noise_level(model, LEVELS):
        together = output(model)
    for index, level in enumerate(LEVELS.tolist()):
        with noise_level(model, level):
            assert relative_error(together[index], output(model)[index]) < 1e-5
