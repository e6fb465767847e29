"""λ (b, k) where the positions of a forward or the rows of a layer aren't known to be k parts a sample: an error.

b, k and l are 3, 4 and 20.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nara_diffusion import noise_level
from nara_diffusion.noise.parts import FrameTokens, Parts, Positions, RowKind, parts_of, positions_of
from tests.helpers.adapted import OneLayer, TwoLayers, adapted

SAMPLES, PARTS, LENGTH = 3, 4, 20
LEVELS = torch.tensor([[0.9, 0.1, 0.4, 0.7], [0.2, 0.6, 0.0, 1.0], [0.3, 0.8, 0.5, 0.15]])


class Other(nn.Module):
    """Its layer sees `seen`, whatever the model gets."""

    def __init__(self, layer: nn.Module, seen: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.seen = seen

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.seen)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(7, 5), (SAMPLES, 8, 7)),  # a text, which k divides
        (nn.Linear(7, 5), (SAMPLES, 2 * LENGTH, 7)),
        (nn.Linear(7, 5), (SAMPLES * LENGTH, 7)),  # not known to be in order
        (nn.Linear(7, 5), (SAMPLES * PARTS, 7)),
        (nn.Linear(7, 5), (SAMPLES * PARTS, LENGTH // PARTS, 7)),
        (nn.Linear(7, 5), (SAMPLES, 7)),
        (nn.Linear(LENGTH, 5), (SAMPLES, LENGTH)),  # features, not positions
        (nn.Linear(7, 5), (2 * SAMPLES, LENGTH, 7)),
        (nn.Linear(7, 5), (LENGTH, SAMPLES, 7)),
        (nn.Conv1d(LENGTH, 5, 3), (SAMPLES, LENGTH, 7)),
        (nn.Conv2d(LENGTH, 5, 3), (SAMPLES, LENGTH, 7, 6)),
    ],
)
@pytest.mark.parametrize("use_dora", [False, True])
def test_layer_without_ordered_positions_is_refused_by_name(
    layer: nn.Module, shape: tuple[int, ...], use_dora: bool
) -> None:
    model, x = Other(layer, torch.randn(shape)), torch.randn(SAMPLES, LENGTH, 7)
    model = adapted(model, target_modules=["layer"], use_dora=use_dora)
    with noise_level(model, LEVELS), pytest.raises(ValueError, match=r"4 values for the 20 positions.*'layer' sees"):
        model(x)


def test_length_first_is_refused_even_with_equal_sizes() -> None:
    block = nn.TransformerEncoderLayer(4, 2, 6)
    model = adapted(OneLayer(block), target_modules=["linear1"])
    with noise_level(model, LEVELS.mT[:, :3]), pytest.raises(ValueError, match=r"'layer\.linear1' sees"):
        model(torch.randn(PARTS, 3, 4))


@pytest.mark.parametrize(
    ("level", "message"),
    [
        (LEVELS[:2], r"shape \(2, 4\).*3 samples of 20"),  # as where guidance doubles the batch
        (LEVELS[:, :3], r"shape \(3, 3\).*3 samples of 20"),
        (torch.rand(3, 4, 1), r"\(3, 4, 1\).*\(batch, parts\)"),
        (torch.rand(3, 0), r"\(3, 0\)"),
        (LEVELS + 0.5, r"lie in \[0, 1\]"),
    ],
)
def test_parts_that_do_not_fit_are_refused(level: Tensor, message: str) -> None:
    model = adapted(TwoLayers(), target_modules=["first"])
    with pytest.raises(ValueError, match=message), noise_level(model, level):
        model(torch.randn(SAMPLES, LENGTH, 7))


def test_separate_part_of_model_has_unknown_positions() -> None:
    model = adapted(TwoLayers(), target_modules=["first"])
    with noise_level(model, LEVELS), pytest.raises(RuntimeError, match="call the whole model"):
        model.base_model.model.first(torch.randn(SAMPLES, LENGTH, 7))
    with noise_level(model, LEVELS[:, :1]):
        model.base_model.model.first(torch.randn(SAMPLES, LENGTH, 7))


def test_merging_takes_no_parts_unless_all_are_one() -> None:
    model = adapted(TwoLayers(), target_modules=["first"])
    with noise_level(model, LEVELS), pytest.raises(ValueError, match="single value"):
        model.merge_adapter()
    with noise_level(model, torch.full((3, 4), 0.5)):
        model.merge_adapter()
        model(torch.randn(SAMPLES, LENGTH, 7))


IDS_OF = torch.zeros(3, 20, dtype=torch.long)
FEATURES = torch.zeros(3, 20, 7)


@pytest.mark.parametrize("name", ["input_ids", "inputs_embeds", "hidden_states", "x"])
def test_positions_are_those_of_the_only_sequence(name: str) -> None:
    sequence = IDS_OF if name == "input_ids" else FEATURES
    earlier_inputs = {} if name == "x" else {"labels": torch.zeros(4, 9, 2)}
    assert positions_of({**earlier_inputs, name: sequence, "mask": torch.ones(3, 2)}, "Model") == Positions(3, 20)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"x": FEATURES[:, :, 0]},  # (b, d)
        {"x": IDS_OF[0]},
        {"input_ids": IDS_OF, "decoder_input_ids": IDS_OF},
        {"hidden_states": FEATURES, "encoder_hidden_states": FEATURES},
        {"input_ids": IDS_OF, "inputs_embeds": FEATURES},
    ],
)
def test_forward_without_single_sequence_has_unknown_positions(arguments: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="no single sequence"):
        positions_of(arguments, "Model")


def test_levels_of_rows_follow_the_parts() -> None:
    parts = parts_of(LEVELS, Positions(SAMPLES, LENGTH))
    assert parts == Parts(PARTS, Positions(SAMPLES, LENGTH))
    assert torch.equal(parts.levels(LEVELS), LEVELS.flatten())
    assert torch.equal(parts.levels(LEVELS[:1]), LEVELS[0].repeat(SAMPLES))


@pytest.mark.parametrize(("kind", "rows"), [("tokens", 59), ("tokens", 12), ("routed tokens", 60), ("positions", 60)])
def test_flattened_tokens_must_be_complete_and_in_order(kind: RowKind, rows: int) -> None:
    parts, core = parts_of(LEVELS, Positions(SAMPLES, LENGTH)), torch.rand(12, 2, 2)
    options = {"is_image": False, "layer_name": "gate"}
    assert parts.core_of_layer(core, torch.zeros(60, 7), kind="tokens", **options) == (core, True)
    with pytest.raises(ValueError, match="'gate' sees"):
        parts.core_of_layer(core, torch.zeros(rows, 7), kind=kind, **options)


# ---------------------------------------------------------------------- frames of a video


def frame_tokens(axis: int = 2) -> FrameTokens:
    return FrameTokens(re.compile("text"), re.compile("time"), axis)


@pytest.mark.parametrize(("axis", "shape"), [(2, (3, 5, 6, 4, 8)), (1, (3, 6, 5, 4, 8))])
def test_frames_are_counted_on_the_classs_axis(axis: int, shape: tuple[int, ...]) -> None:
    """Six frames of 4 × 8 in five channels, in patches of two frames and 2 × 4: three frames of four patches."""
    model: Any = SimpleNamespace(config=SimpleNamespace(patch_size=(2, 2, 4)))
    assert frame_tokens(axis).shape(model, {"hidden_states": torch.zeros(shape)}) == (3, 12)


@pytest.mark.parametrize(("timesteps", "is_seen"), [(PARTS, True), (LENGTH, True), (5, False)])
def test_rows_of_times_need_parts_that_divide_them(timesteps: int, is_seen: bool) -> None:
    parts = parts_of(LEVELS, Positions(SAMPLES, LENGTH, timesteps), frame_tokens())
    core, x = torch.rand(SAMPLES * PARTS + SAMPLES, 2, 2), torch.zeros(SAMPLES * timesteps, 7)
    if not is_seen:
        with pytest.raises(ValueError, match="'time' sees"):
            parts.core_of_layer(core, x, kind="samples", is_image=False, layer_name="time")
        return
    rows, has_parts = parts.core_of_layer(core, x, kind="samples", is_image=False, layer_name="time")
    assert torch.equal(rows, core[: SAMPLES * PARTS])
    assert has_parts
