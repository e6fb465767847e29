"""`torch.jit.trace` and `torch.export` of an adapted model: what it gives is eager at the same λ.

Inside `noise_level` λ is a constant of the graph, which a warning says: a traced model knows of no context. Where a
source tells λ from the model's own inputs, the graph reads it from those.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nara_diffusion import noise_level
from tests.helpers.adapted import TwoLayers, adapted, relative_error
from tests.helpers.layers.beside_lora import LEVELS, TARGETS
from tests.helpers.pipelines.unet import tiny_unet

pytestmark = [
    *(
        pytest.mark.filterwarnings(f"ignore:`torch.jit.*` is deprecated:{category}")
        for category in ("DeprecationWarning", "FutureWarning")  # the second from PyTorch 2.14 on
    ),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),  # λ is checked, and is a constant
]
CONSTANT = pytest.mark.filterwarnings("ignore:What is traced here keeps λ:UserWarning")
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


@CONSTANT
@CASES
def test_a_traced_model_outside_of_any_context_gives_eager_at_the_level_of_its_trace(use_dora, level):
    model, traced, x, expected = traced_model(use_dora, level)
    assert relative_error(traced(x), expected) < 1e-6
    with noise_level(model, 0.9):
        assert relative_error(traced(x), expected) < 1e-6
        assert relative_error(model(x), expected) > 0.01


@CONSTANT
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


@CONSTANT
@SHARING
@CASES
def test_a_traced_model_that_is_saved_and_loaded_gives_the_same(tmp_path: Path, use_dora, level, sharing):
    _, traced, x, expected = traced_model(use_dora, level, core_sharing=sharing)
    traced.save(tmp_path / "model.pt")
    assert relative_error(torch.jit.load(tmp_path / "model.pt")(x), expected) < 1e-6


@CONSTANT
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


TRACERS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "torch.jit.trace": torch.jit.trace,  # which runs the model three times, to check what it has traced
    "torch.export": lambda model, x: torch.export.export(model, (x,)),
}


def said(trace: Callable[[], Any]) -> list[str]:
    """What `trace` warns of as a user is told, tracers apart."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        trace()
    return [str(one.message) for one in caught if one.category is UserWarning]


@pytest.mark.parametrize(("level", "named"), [(0.3, "0.3"), (torch.tensor([0.25, 0.5, 1.0]), "0.25, 0.5, 1")])
@pytest.mark.parametrize("tracer", TRACERS)
def test_tracing_inside_noise_level_warns_once_that_the_level_is_a_constant(tracer: str, level, named: str) -> None:
    model = adapted(TwoLayers(), target_modules=TARGETS)
    with noise_level(model, level):
        (message,) = said(lambda: TRACERS[tracer](model, torch.randn(3, 6, 7)))
    assert message.startswith(f"What is traced here keeps λ = {named} for good")
    assert "set_noise_source(model, source)" in message


@pytest.mark.parametrize("tracer", TRACERS)
def test_tracing_a_part_of_the_model_inside_noise_level_warns_once(tracer: str) -> None:
    model = adapted(TwoLayers(), target_modules=TARGETS)
    model.requires_grad_(False)  # torch.jit.trace takes no trainable constants, and the cores are none of the part's
    part = nn.Sequential(model.base_model.model.first, nn.Tanh(), model.base_model.model.second)
    with noise_level(model, 0.25):
        (message,) = said(lambda: TRACERS[tracer](part, torch.randn(3, 6, 7)))
    assert message.startswith("What is traced here keeps λ = 0.25 for good")


def test_tracing_twice_inside_one_context_warns_once_a_context() -> None:
    model = adapted(TwoLayers(), target_modules=TARGETS)

    def both() -> None:
        for level in (0.25, 0.75):
            with noise_level(model, level):
                for _ in range(2):
                    torch.jit.trace(model, torch.randn(3, 6, 7))

    assert [message[:34] for message in said(both)] == [
        f"What is traced here keeps λ = {level}" for level in (0.25, 0.75)
    ]


class AtALevel(nn.Module):
    """Enters the context itself, at a level among its inputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        with noise_level(self.model, level):
            return self.model(x)


def test_tracing_with_the_context_inside_reads_the_level_from_the_inputs_and_does_not_warn() -> None:
    model = AtALevel(adapted(TwoLayers(), target_modules=TARGETS))
    x, traced = torch.randn(3, 6, 7), []
    assert not said(lambda: traced.append(torch.jit.trace(model, (x, torch.tensor([0.1, 0.2, 0.3])))))
    level = torch.tensor([0.9, 0.4, 0.6])
    assert relative_error(traced[0](x, level), model(x, level)) < 1e-6


def test_tracing_a_denoiser_that_reads_its_timestep_does_not_warn() -> None:
    denoiser = Denoiser(adapted(tiny_unet(), target_modules=["to_q"]))
    inputs = (torch.randn(2, 3, 8, 8), torch.tensor(100), torch.randn(2, 4, 12))
    assert not said(lambda: torch.jit.trace(denoiser, inputs))
    assert not said(lambda: denoiser(*inputs))


def test_a_forward_that_nobody_traces_does_not_warn() -> None:
    model = adapted(TwoLayers(), target_modules=TARGETS)
    with noise_level(model, 0.3):
        assert not said(lambda: (model(torch.randn(3, 6, 7)), torch.compile(model, backend="eager")(torch.randn(3, 7))))
