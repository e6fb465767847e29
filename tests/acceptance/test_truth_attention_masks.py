"""λ that is read from `input_ids`, under every kind of attention mask that a foreign sampler passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from nara_diffusion import NaraConfig, noise_level
from nara_diffusion.dllm import load_backbone, read_noise_from_input_ids

LLADA_TINY = Path(__file__).parents[2] / "examples" / "assets" / "llada-tiny"
MASK = 283
INPUT_IDS = torch.tensor([[9, 8, 7, MASK, 5, MASK, 6, 279, 279, 279, 279, 279], [9, MASK, 7, 4, 5, MASK] * 2])
REAL = torch.tensor([[True] * 7 + [False] * 5, [True] * 12])
SHARES = torch.tensor([2 / 4, 3 / 9])  # of the answers behind 3 tokens of prompt; 2 / 9 with padding


@pytest.fixture(scope="module")
def adapted() -> Any:
    model, _ = load_backbone(str(LLADA_TINY))
    model = get_peft_model(model, NaraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"]))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def pairs() -> torch.Tensor:
    return REAL[:, None, None, :] & REAL[:, None, :, None] | torch.eye(12, dtype=torch.bool) & REAL[:, None, :, None]


def additive(mask: torch.Tensor, minimum: float) -> torch.Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, minimum)


@pytest.mark.parametrize(
    "mask",
    [
        REAL.long(),
        REAL[:, None, None, :].expand(2, 1, 12, 12),
        REAL[:, None, None, :],
        pairs().expand(2, 4, 12, 12),
        additive(REAL[:, None, None, :].expand(2, 1, 12, 12), torch.finfo(torch.float32).min),
        additive(REAL[:, None, None, :].expand(2, 1, 12, 12), -float("inf")),
        additive(REAL[:, None, None, :].expand(2, 1, 12, 12), -10000.0),
    ],
    ids=["rows", "columns", "columns, one row", "pairs, a head each", "smallest", "infinite", "-10000"],
)
@torch.no_grad()
def test_padding_is_no_answer_under_any_attention_mask(adapted: Any, mask: torch.Tensor) -> None:
    with noise_level(adapted, SHARES):
        expected = adapted(INPUT_IDS, attention_mask=mask).logits
    with read_noise_from_input_ids(adapted, 3):
        actual = adapted(INPUT_IDS, attention_mask=mask).logits
    seen = REAL if mask.ndim == 4 else torch.ones_like(REAL)  # rows that see nothing have no logits
    assert torch.equal(actual[seen], expected[seen])
    assert actual[seen].isfinite().all()


def test_an_attention_mask_that_can_t_tell_is_refused(adapted: Any) -> None:
    for mask in [
        REAL[:, None, :] & REAL[:, :, None],
        torch.zeros(2, 1, 12, 12) - 3.5,
        torch.ones(2, 1, 12, 12),
        torch.stack([REAL, ~REAL], 1)[:, :, None, :],
        torch.ones(2, 1, 12, 15, dtype=torch.bool),
        {"full_attention": None},
    ]:
        message = r"attention_mask .* which of the tokens are padding: .* noise_level\("
        with read_noise_from_input_ids(adapted, 3), pytest.raises(ValueError, match=message):
            adapted(INPUT_IDS, attention_mask=mask)
