"""λ of samples → C of a layer's rows: one for all, one a sample, b · k rows, guidance, and what can't be assigned.

Each C is filled with the number of its sample, so that a row shows whose C it has.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nara_diffusion.noise.rows import ModelRows, core_of_rows, guidance_rows, repeat_rows, row_kind_of
from nara_diffusion.noise.timesteps import DenoiserNoise
from tests.helpers.adapted import adapted

SAMPLES = 3


def core(samples: int = SAMPLES) -> Tensor:
    """C (samples, 2, 2)."""
    return torch.arange(samples).float()[:, None, None].expand(-1, 2, 2)


def samples_of(rows: int, *, samples: int = SAMPLES, x: Tensor | None = None, **options: Any) -> list[int]:
    """The sample of each row of a layer."""
    options = {"kind": "samples", "sample_major": False, "layer_name": "block.to_q"} | options
    cores = core_of_rows(core(samples), torch.zeros(rows, 5, 7) if x is None else x, **options)
    return cores[:, 0, 0].int().tolist()


# ---------------------------------------------------------------------- one for all, one a sample, b · k rows


@pytest.mark.parametrize("kind", ["samples", "tokens", "positions"])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_one_level_applies_to_all_rows(kind: str, rows: int) -> None:
    assert samples_of(rows, samples=1, kind=kind) == [0]


@pytest.mark.parametrize("sample_major", [False, True])
def test_one_level_per_sample_applies_to_its_row(sample_major: bool) -> None:
    assert samples_of(3, sample_major=sample_major) == [0, 1, 2]


def test_consecutive_rows_have_the_level_of_their_sample() -> None:
    """`repeat` in place of `repeat_interleave` would give [0, 1, 2, 0, 1, 2]: another frame's λ."""
    assert samples_of(6, sample_major=True) == [0, 0, 1, 1, 2, 2]
    assert samples_of(8, samples=2, sample_major=True) == [0, 0, 0, 0, 1, 1, 1, 1]


def test_tiled_rows_have_the_level_of_their_sample() -> None:
    assert samples_of(6, tiled=True) == [0, 1, 2, 0, 1, 2]
    rows = ModelRows(DenoiserNoise("sigma", tiled=True))
    assert rows.level_of_forward(LEVELS, Stack(), (X,), {}) is LEVELS
    with pytest.raises(ValueError, match=f"{REFUSED}one per sample"):
        rows.level_of_forward(LEVELS, Stack(), (torch.zeros(6, 2, 7),), {})
    with pytest.raises(RuntimeError, match=f"{REFUSED}call the whole model"):
        rows.level_of_part(torch.rand(3))


def test_expert_without_tokens_keeps_core_for_gradient() -> None:
    assert samples_of(0) == [0]


def test_rows_are_repeated_in_either_order() -> None:
    values = torch.tensor([0.1, 0.5, 0.9])
    assert torch.equal(repeat_rows(values, 2, "tiled"), values[[0, 1, 2, 0, 1, 2]])
    assert torch.equal(repeat_rows(values, 2, "interleaved"), values[[0, 0, 1, 1, 2, 2]])


class Stack(nn.Module):
    """A layer that sees the frames of all samples, one sample after another."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(7, 5)

    def forward(self, x: Tensor, timestep: Tensor | None = None) -> Tensor:
        return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


# ---------------------------------------------------------------------- guidance


def test_guidance_rows_are_the_samples_twice() -> None:
    assert guidance_rows(torch.tensor([0.2, 0.7])).tolist() == pytest.approx([0.2, 0.7, 0.2, 0.7])


# ---------------------------------------------------------------------- what can't be assigned


LEVELS, X = torch.tensor([0.1, 0.5, 0.9]), torch.zeros(3, 2, 7)
REFUSED = "noise_level has 3 values, but .*: pass one value for the whole batch, or "


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (4, {}, "batch inside layer 'block.to_q' is 4"),
        (6, {}, "batch inside layer 'block.to_q' is 6"),  # a multiple, but not known to be sample-major
        (4, {"sample_major": True}, "is 4"),
        (2, {"sample_major": True}, "is 2"),
        (3, {"kind": "tokens", "x": torch.zeros(3, 7)}, r"\(3, 7\), are tokens"),
        (3, {"kind": "positions"}, r"\(3, 5, 7\), are positions"),
        (3, {"kind": "positions", "x": torch.zeros(3, 3, dtype=torch.long)}, r"\(3, 3\), are positions"),
    ],
)
def test_rows_of_no_known_sample_are_refused(rows: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=REFUSED) as error:
        samples_of(rows, **options)
    error.match(message)
    same = torch.full((SAMPLES, 2, 2), 0.5)
    x = options.pop("x", torch.zeros(rows, 5, 7))
    options = {"kind": "samples", "sample_major": False, "layer_name": "block.to_q"} | options
    assert torch.equal(core_of_rows(same, x, **options), same[:1])  # one C for all rows, after all


@pytest.mark.parametrize(
    ("kind", "x"),
    [
        ("tokens", torch.zeros(3, 5, 7)),
        ("positions", torch.zeros(3, 7)),
        ("positions", torch.zeros(3, dtype=torch.long)),
    ],
)
def test_other_rows_are_samples_at_these_shapes(kind: str, x: Tensor) -> None:
    assert samples_of(3, kind=kind, x=x) == [0, 1, 2]


def test_model_with_tokens_first_refuses_several_levels_everywhere() -> None:
    for denoiser in (DenoiserNoise("sigma", one_level=True), DenoiserNoise("data", packed=True)):
        rows = ModelRows(denoiser)
        with pytest.raises(ValueError, match=f"{REFUSED}.*one by one"):
            rows.level_of_forward(LEVELS, Stack(), (torch.zeros(3, 2, 7),), {})
        assert rows.level_of_forward(torch.full((3,), 0.3), Stack(), (), {}).tolist() == [pytest.approx(0.3)]
        with pytest.raises(RuntimeError, match=f"{REFUSED}call the whole model"):
            rows.level_of_part(torch.rand(3))


def test_multiples_take_one_level_per_batch_row() -> None:
    rows = ModelRows(DenoiserNoise("sigma", sample_major=True))
    for args, kwargs in (((X,), {}), ((), {"timestep": torch.zeros(3), "x": X})):
        assert rows.level_of_forward(LEVELS, Stack(), args, kwargs) is LEVELS
    for args in ((torch.zeros(6, 2, 7),), (torch.zeros(2, 3, 7),), (torch.tensor(1.0),)):
        with pytest.raises(ValueError, match=f"{REFUSED}one per sample"):
            rows.level_of_forward(LEVELS, Stack(), args, {})
        assert len(rows.level_of_forward(torch.full((3,), 0.3), Stack(), args, {})) == 1
    with pytest.raises(RuntimeError, match=f"{REFUSED}call the whole model"):
        rows.level_of_part(torch.rand(3))


@pytest.mark.parametrize(
    ("attributes", "is_split"),
    [
        ({"_chunk_size": 2, "_chunk_dim": 0}, True),
        ({"_chunk_size": 2, "_chunk_dim": 1}, False),
        ({"_chunk_size": None, "_chunk_dim": 0}, False),
    ],
)
def test_blocks_that_split_the_batch_are_refused(attributes: dict[str, Any], is_split: bool) -> None:
    root = Stack()
    vars(root.layer).update(attributes)
    rows, args = ModelRows(DenoiserNoise(sample_major=True)), (torch.zeros(3, 2, 7),)
    if not is_split:
        assert rows.level_of_forward(LEVELS, root, args, {}) is LEVELS
        return
    with pytest.raises(ValueError, match=f"{REFUSED}turn that off"):
        rows.level_of_forward(LEVELS, root, args, {})


def test_sample_models_leave_the_check_to_layers() -> None:
    for rows in (ModelRows(), ModelRows(DenoiserNoise("sigma"))):
        assert rows.level_of_forward(LEVELS, Stack(), (torch.zeros(6, 2, 7),), {}) is LEVELS
        rows.level_of_part(torch.rand(3))


# ---------------------------------------------------------------------- what a layer's rows are


def container(**modules: nn.Module) -> nn.Module:
    root = nn.Module()
    for name, module in modules.items():
        root.add_module(name, module)
    return root


class SmallExperts(nn.ModuleList):
    """Experts by its name."""


@pytest.mark.parametrize(
    ("root", "name", "kind"),
    [
        (container(layer=nn.Linear(2, 2)), "layer", "samples"),
        (container(mlp=container(gate=nn.Linear(2, 2), experts=nn.ModuleList())), "mlp.gate", "tokens"),
        (container(mlp=SmallExperts([nn.Linear(2, 2)])), "mlp.0", "routed tokens"),
        (container(mlp=container(experts=nn.ModuleList([nn.Linear(2, 2)]))), "mlp.experts.0", "routed tokens"),
        (container(block=nn.TransformerEncoderLayer(4, 2, 6)), "block.linear1", "positions"),
        (container(block=nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)), "block.linear1", "samples"),
        (container(words=nn.Embedding(3, 2)), "words", "samples"),
        (container(words=nn.Embedding(3, 2), attention=nn.MultiheadAttention(4, 2)), "words", "samples"),
        (container(relative_attention_bias=nn.Embedding(3, 2)), "relative_attention_bias", "positions"),
        (container(distance_embedding=nn.Embedding(3, 2)), "distance_embedding", "positions"),
    ],
)
def test_row_kind_follows_from_the_modules_around(root: nn.Module, name: str, kind: str) -> None:
    assert row_kind_of(root, name) == kind


def test_row_kind_is_same_in_adapted_model() -> None:
    base = container(relative_attention_bias=nn.Embedding(3, 2), words=nn.Embedding(3, 2), layer=nn.Linear(2, 2))
    root = adapted(base, target_modules=["relative_attention_bias", "words", "layer"]).base_model.model
    kinds = {name: row_kind_of(root, name) for name in ("relative_attention_bias", "words", "layer")}
    assert kinds == {"relative_attention_bias": "positions", "words": "samples", "layer": "samples"}
