"""`torch.jit.trace` and `torch.export` of an adapted model: what it gives is eager at the same λ.

Inside `noise_level` λ is a constant of the graph: a traced model knows of no context. Where a source tells λ from the
model's own inputs, the graph reads it from those.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nara_diffusion import noise_level
from tests.adapted import TwoLayers, adapted, relative_error
from tests.beside_lora import LEVELS, TARGETS
from tests.tiny_unet import tiny_unet

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),  # λ is checked, and is a constant
]
CASES = pytest.mark.parametrize(
    ("use_dora", "level"),
    [(use_dora, level) for use_dora in (False, True) for level in (0.3, LEVELS)],
    ids=["NaRA-one λ", "NaRA-a λ each", "NaRA-DoRA-one λ", "NaRA-DoRA-a λ each"],
)


def traced_model(use_dora: bool, level: Any, **options: Any) -> tuple[Any, Any, Tensor, Tensor]:
    """A model, its trace, an input other than that of the trace, and what eager makes of it."""
    model = adapted(TwoLayers(), target_modules=TARGETS, use_dora=use_dora, **options)
    seen, x = torch.randn(2, 3, 6, 7)
    with noise_level(model, level):
        return model, torch.jit.trace(model, seen), x, model(x)


@CASES
def test_a_traced_model_outside_of_any_context_gives_eager_at_the_level_of_its_trace(use_dora, level):
    model, traced, x, expected = traced_model(use_dora, level)
    assert relative_error(traced(x), expected) < 1e-6
    with noise_level(model, 0.9):
        assert relative_error(traced(x), expected) < 1e-6
        assert relative_error(model(x), expected) > 0.01


@CASES
def test_gradients_of_a_traced_model_are_those_of_eager(use_dora, level):
    model, traced, x, expected = traced_model(use_dora, level)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ours, theirs = (torch.autograd.grad(y.square().sum(), list(trainable.values())) for y in (traced(x), expected))
    for name, one, other in zip(trainable, ours, theirs, strict=True):
        assert other.count_nonzero(), name
        assert relative_error(one, other) < 1e-5, name


class Denoiser(nn.Module):
    """A denoiser as a function of tensors alone."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return self.unet(x, timestep, encoder_hidden_states=text, return_dict=False)[0]


@pytest.mark.parametrize("use_dora", [False, True], ids=["NaRA", "NaRA-DoRA"])
@pytest.mark.parametrize("seen", [torch.tensor(100), torch.tensor([100, 300])], ids=["one λ", "a λ each"])
def test_a_traced_denoiser_outside_of_any_context_reads_its_level_from_each_timestep(seen, use_dora):
    denoiser = Denoiser(adapted(tiny_unet(), target_modules=["to_q", "to_k", "to_v"], use_dora=use_dora))
    x, text = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 12)
    traced = torch.jit.trace(denoiser, (x, seen, text))
    timestep = 2 * seen + 100
    expected = denoiser(x, timestep, text)
    assert relative_error(traced(x, timestep, text), expected) < 1e-6
    assert relative_error(denoiser(x, seen, text), expected) > 0.01


def test_tracing_without_a_level_is_refused():
    model = adapted(TwoLayers(), target_modules=TARGETS)
    with pytest.raises(ValueError, match="λ is not known"):
        torch.jit.trace(model, torch.randn(3, 6, 7))


SHARING = pytest.mark.parametrize("sharing", ["module_type", "global"])


@SHARING
@CASES
def test_a_traced_model_that_is_saved_and_loaded_gives_the_same(tmp_path: Path, use_dora, level, sharing):
    _, traced, x, expected = traced_model(use_dora, level, core_sharing=sharing)
    traced.save(tmp_path / "model.pt")
    assert relative_error(torch.jit.load(tmp_path / "model.pt")(x), expected) < 1e-6


@SHARING
@CASES
def test_an_exported_model_gives_eager_at_the_level_of_its_export_also_from_a_file(
    tmp_path: Path, use_dora, level, sharing
):
    model = adapted(TwoLayers(), target_modules=TARGETS, use_dora=use_dora, core_sharing=sharing)
    seen, x = torch.randn(2, 3, 6, 7)
    with noise_level(model, level):
        exported, expected = torch.export.export(model, (seen,)), model(x)
    torch.export.save(exported, tmp_path / "model.pt2")
    for program in (exported, torch.export.load(tmp_path / "model.pt2")):
        assert relative_error(program.module()(x), expected) < 1e-6
