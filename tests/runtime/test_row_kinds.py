"""What the rows of a layer are, class by class: each entry of the tables in `samples` on its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import FSMTConfig, FSMTModel, Mask2FormerConfig, MLCDVisionConfig, XLNetConfig, XLNetModel
from transformers.models.mask2former.modeling_mask2former import Mask2FormerMaskedAttentionDecoderLayer
from transformers.models.mlcd.modeling_mlcd import MLCDAttention
from transformers.models.oneformer.modeling_oneformer import OneFormerTransformerDecoderFFNLayer

from nara_diffusion.layers.rows import check_rows, rows_of

SIZES: dict[str, Any] = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "d_model": 16}
SIZES |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}


class RoutedExperts(nn.Module):
    """Experts that no attribute `experts` holds."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)


class BesideAttention(nn.Module):
    """Without a `batch_first` of its own."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attention, self.linear = nn.MultiheadAttention(16, 2, batch_first=batch_first), nn.Linear(16, 8)


def xlnet() -> nn.Module:
    return XLNetModel(XLNetConfig(vocab_size=49, d_model=16, n_layer=1, n_head=2, d_inner=24))


def fsmt() -> nn.Module:
    return FSMTModel(FSMTConfig(langs=["en", "de"], src_vocab_size=49, tgt_vocab_size=49, **SIZES))


@pytest.mark.parametrize(
    ("make", "name", "rows"),
    [
        (RoutedExperts, "first", "tokens"),
        (fsmt, "encoder.layers.0.fc1", "positions"),
        (fsmt, "decoder.layers.0.fc1", "positions"),
        (lambda: Mask2FormerMaskedAttentionDecoderLayer(Mask2FormerConfig()), "fc1", "positions"),
        (lambda: OneFormerTransformerDecoderFFNLayer(16, 24), "linear1", "positions"),
        (xlnet, "word_embedding", "positions"),
        (lambda: nn.MultiheadAttention(16, 2), "out_proj", "positions"),
        (lambda: nn.MultiheadAttention(16, 2, batch_first=True), "out_proj", "samples"),
        (lambda: BesideAttention(False), "linear", "positions"),
        (lambda: BesideAttention(True), "linear", "samples"),
        (lambda: MLCDAttention(MLCDVisionConfig(hidden_size=16, num_attention_heads=2)), "out_proj", "positions"),
    ],
    ids=[
        *("class of experts", "FSMT's encoder", "FSMT's decoder", "Mask2Former", "OneFormer", "XLNet's ids"),
        *("in attention", "in attention, batch first", "beside attention", "beside attention, batch first", "MLCD"),
    ],
)
def test_rows_of_each_known_class_says_what_its_layers_see(make: Any, name: str, rows: str) -> None:
    with torch.device("meta"):
        model = nn.Sequential(make())
    assert rows_of(model, f"0.{name}") == rows


@pytest.mark.parametrize(
    ("rows", "shape", "refused"),
    [
        ("tokens", (4, 8), True),
        ("tokens", (4, 5, 8), False),
        ("positions", (5, 4, 8), True),
        ("positions", (4, 8), False),
        ("samples", (4, 8), False),
    ],
)
def test_check_rows_refuses_several_levels_where_rows_are_no_samples(rows: Any, shape: Any, refused: bool) -> None:
    check_rows(rows, torch.zeros(shape), 1, "layer")
    if refused:
        with pytest.raises(ValueError, match=f"are {rows}, not samples"):
            check_rows(rows, torch.zeros(shape), 4, "layer")
    else:
        check_rows(rows, torch.zeros(shape), 4, "layer")


def test_check_rows_refuses_ids_of_relative_positions() -> None:
    check_rows("positions", torch.zeros(4, dtype=torch.long), 4, "layer")  # which another check refuses
    with pytest.raises(ValueError, match="are positions, not samples"):
        check_rows("positions", torch.zeros(4, 4, dtype=torch.long), 4, "layer")
