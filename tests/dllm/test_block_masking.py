"""Training on one block of each answer: what is masked, its λ, and the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nara_diffusion import noise_level
from nara_diffusion.dllm import load_backbone, log_likelihood, mask_answers, masked_diffusion_loss
from tests.acceptance._text import nara
from tests.helpers.mixtures import LLADA2, MASK, block_seen, write_checkpoint

B = 4
IDS = torch.randint(6, MASK, (3, 15), generator=torch.Generator().manual_seed(0))
BATCH: dict[str, Any] = {"input_ids": IDS, "prompt_lengths": [5, 2, 8], "answer_lengths": [10, 9, 3], "seed": 4}


def test_blocks_are_drawn_by_tokens_with_clean_rest() -> None:
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for index in range(400):
        indices = [index, index + 1000, index + 2000]
        batch = mask_answers(**BATCH, mask_token_id=MASK, block_length=B, sample_indices=indices)
        width = batch.input_ids.shape[1]
        assert width % B == 0
        levels = batch.forward_level
        for row, (start, size) in enumerate(zip([5, 2, 8], [10, 9, 3], strict=True)):
            block = int(levels[row].nonzero()[0])
            places = [i for i in range(block * B, block * B + B) if start <= i < start + size]
            assert batch.answer[row].nonzero()[:, 0].tolist() == places
            assert batch.attention_mask is not None
            assert batch.attention_mask[row].tolist() == [int(i <= places[-1]) for i in range(width)]
            assert levels[row, block] == batch.noise_level[row]
            assert levels[row].count_nonzero() == 1
            visible = batch.input_ids[row, : places[-1] + 1]
            assert visible.equal(IDS[row, : places[-1] + 1].masked_fill(batch.masked[row, : places[-1] + 1], MASK))
            seen[row].append(block)
    counts = [torch.tensor(seen[row]).bincount(minlength=4) / 400 for row in range(3)]
    expected = [[0, 0.3, 0.4, 0.3], [2 / 9, 4 / 9, 3 / 9, 0], [0, 0, 1, 0]]
    torch.testing.assert_close(torch.stack(counts), torch.tensor(expected), atol=0.07, rtol=0)


@pytest.mark.parametrize("chunk_size", [3, None])
def test_loss_covers_active_blocks_at_their_levels(tmp_path: Path, chunk_size: int | None) -> None:
    write_checkpoint(tmp_path, LLADA2 | {"block_length": B})
    base = load_backbone(str(tmp_path), dtype=torch.float64, experts_implementation="eager")[0]
    model = nara(base, target_modules=["q_proj", "v_proj", "down_proj"])
    loss = masked_diffusion_loss(model, **BATCH, chunk_size=chunk_size)
    width = loss.input_ids.shape[1]
    for row in range(3):
        places = loss.answer[row].nonzero()[:, 0]
        end = int(places[0]) // B * B + B
        ids = F.pad(loss.input_ids[row], (0, width))[:end]
        seen = block_seen(end, B) & (torch.arange(end) <= places[-1]) | torch.eye(end, dtype=torch.bool)
        level = torch.zeros(1, end // B)
        level[0, -1] = loss.noise_level[row]
        with noise_level(model, level):
            logits = model(ids[None], attention_mask=seen[None, None]).logits[0]
        losses = F.cross_entropy(logits, loss.targets[row, :end], reduction="none")[loss.masked[row, :end]]
        expected = losses.sum() / loss.noise_level[row].double() / len(places)
        torch.testing.assert_close(loss.per_sample[row].double(), expected, rtol=1e-6, atol=1e-6)


def test_likelihood_of_a_whole_text_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, LLADA2)
    with pytest.raises(ValueError, match="block by block"):
        log_likelihood(load_backbone(str(tmp_path))[0], IDS, [5, 2, 8])
