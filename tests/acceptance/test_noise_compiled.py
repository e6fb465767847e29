"""torch.compile: one graph over all λ, at most one break, at the root; the values are those without it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from nara_diffusion import noise_level
from tests.helpers.rounding import rounding_of
from tests.helpers.small_pipelines import small_sd, small_unet

from . import _lives
from ._noise_models import LAYERS, UNET_TARGETS, Stock, TwoLayers, adapt, assert_near, distance, run

TEXT = 20
LEVELS = [torch.tensor(values) for values in ([0.05, 0.5, 0.93], [0.8, 0.2, 0.6], [0.0, 1.0, 0.31])]
X = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))

pytestmark = [
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
    # Dynamo looks at the gradient of each input
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def both() -> tuple[Any, Stock]:
    torch.manual_seed(0)
    model, stock = adapt(TwoLayers(), LAYERS)
    return model, stock.double()


def breaks() -> int:
    return sum(counters["graph_break"].values())


def test_compiled_layer_is_one_graph_over_all_levels(both: tuple[Any, Stock]) -> None:
    model, stock = both
    backend = CompileCounterWithBackend("eager")
    for layer in (model.base_model.model.first, model.base_model.model.second):
        layer.compile(backend=backend, fullgraph=True)
    for index, levels in enumerate(LEVELS):
        with noise_level(model, levels), torch._dynamo.config.patch(error_on_recompile=index > 0):
            assert_near(run(model, X), stock.each(levels, X.double()), model)
    assert backend.frame_count == 2
    assert breaks() == 0


def test_compiled_model_matches_each_level_with_one_break(
    both: tuple[Any, Stock],
) -> None:
    model, stock = both
    backend = CompileCounterWithBackend("aot_eager")
    fast, gradients_of_both = torch.compile(model.train(), backend=backend), []
    for called in (fast, model):
        for index, levels in enumerate([*LEVELS, LEVELS[0]]):
            model.zero_grad()
            with noise_level(model, levels), torch._dynamo.config.patch(error_on_recompile=index > 0):
                output = called(X)
            assert_near(output, stock.each(levels, X.double()), model)
            output.square().mean().backward()
            gradients_of_both.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    for actual, expected in zip(gradients_of_both[:4], gradients_of_both[4:], strict=True):
        for name, gradient in expected.items():
            assert distance(actual[name], gradient) < rounding_of(model), name
    assert backend.frame_count <= 2
    assert breaks() <= 1
    with pytest.raises(ValueError, match="λ is not known"):
        run(fast, X)


class Checkpointed(nn.Module):
    """One block, under the checkpoint function that transformers and Diffusers give to theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.block = TwoLayers()
        self._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    def forward(self, x: Tensor) -> Tensor:
        return self._gradient_checkpointing_func(self.block.__call__, x)


def test_compiled_model_with_checkpoints_is_one_graph() -> None:
    torch.manual_seed(0)
    model, _ = adapt(Checkpointed(), LAYERS)
    backend = CompileCounterWithBackend("aot_eager")
    fast, gradients_of_both = torch.compile(model.train(), backend=backend), []
    for called in (fast, model):
        for levels in LEVELS[:2]:
            model.zero_grad()
            with noise_level(model, levels):
                called(X).square().mean().backward()
            gradients_of_both.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    for actual, expected in zip(gradients_of_both[:2], gradients_of_both[2:], strict=True):
        for name, gradient in expected.items():
            assert distance(actual[name], gradient) < rounding_of(model), name
    assert backend.frame_count == 1
    assert breaks() == 0


@pytest.mark.slow
def test_compiled_unet_handles_all_timesteps_with_one_break() -> None:
    unet, stock = adapt(small_unet(TEXT), UNET_TARGETS, scale=0.3)
    stock.double()
    generator = torch.Generator().manual_seed(2)
    latents, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, TEXT, generator=generator)
    backend = CompileCounterWithBackend("eager")
    unet.compile(backend=backend)

    def check(timesteps: Tensor, levels: Tensor) -> None:
        expected = stock.each(levels, latents.double(), timesteps.double(), text.double())
        assert_near(run(unet, latents, timesteps, text), expected, unet)

    for index, values in enumerate(([950.0, 30.0], [200.0, 700.0], [0.0, 999.0], [13.5, 400.0])):
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            check(torch.tensor(values), torch.tensor(values) / 1000)
    graphs = backend.frame_count
    assert graphs <= 2
    assert breaks() <= 1
    with noise_level(unet, torch.tensor([0.3, 0.8])):
        check(torch.tensor([500.0, 100.0]), torch.tensor([0.3, 0.8]))
    with noise_level(unet, torch.tensor([0.6, 0.1])), torch._dynamo.config.patch(error_on_recompile=True):
        check(torch.tensor([500.0, 100.0]), torch.tensor([0.6, 0.1]))


@pytest.mark.slow
def test_hotswap_at_equal_rank_compiles_nothing_again(tmp_path: Path) -> None:
    shallow = {"block_out_channels": (8,), "attention_head_dim": 4}
    shallow |= {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    outputs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        source: Any = _lives.add_nara(small_sd(**shallow), seed=seed)
        source.save_nara_weights(tmp_path / str(seed))
        outputs.append(_lives.predict(source))
    pipe: Any = small_sd(**shallow)
    pipe.load_nara_weights(tmp_path / "1", adapter_name="toy")
    counter = CompileCounter()
    pipe.unet.compile(backend=counter)
    _lives.assert_near(_lives.predict(pipe), outputs[0], pipe.unet)
    _lives.predict(pipe, torch.tensor([1, 20, 300]))
    graphs = counter.frame_count
    assert graphs
    pipe.load_nara_weights(tmp_path / "2", adapter_name="toy", hotswap=True)
    _lives.assert_near(_lives.predict(pipe), outputs[1], pipe.unet)
    assert counter.frame_count == graphs
