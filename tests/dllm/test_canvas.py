"""Where prompts, masks and padding stand on a canvas; the rows of guidance; lengths that a model can't have."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from nara_diffusion.dllm.models.backbone import Backbone
from nara_diffusion.dllm.models.forward_rows import rows_of_guidance
from nara_diffusion.dllm.prompt_places import check_canvas, checked_lengths, place_prompts

MASK, PAD, POSITIONS = 29, 0, 12
PROMPTS = [[7, 8, 9, 10], [11], [12, 13]]


@pytest.fixture(scope="module")
def model() -> BertForMaskedLM:
    sizes = {"vocab_size": 30, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    return BertForMaskedLM(BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=POSITIONS))


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The prompts (b, p) with padding on a side, and their attention mask."""
    ids, mask = torch.full((3, 4), 5), torch.zeros(3, 4, dtype=torch.long)
    for row, prompt in enumerate(PROMPTS):
        place = slice(0, len(prompt)) if side == "right" else slice(4 - len(prompt), 4)
        ids[row, place], mask[row, place] = torch.tensor(prompt), 1
    return ids, mask


@pytest.mark.parametrize("side", ["right", "left", "lengths"])
def test_each_prompt_is_followed_by_its_own_masks(model: BertForMaskedLM, side: str) -> None:
    ids, mask = padded("right" if side == "lengths" else side)
    where = {"prompt_lengths": [4, 1, 2]} if side == "lengths" else {"attention_mask": mask}
    sequences, starts, real = place_prompts(Backbone(model), ids.int(), 3, MASK, PAD, **where)
    expected = [prompt + [MASK] * 3 + [PAD] * (4 - len(prompt)) for prompt in PROMPTS]
    assert (sequences.tolist(), starts.tolist()) == (expected, [4, 1, 2])
    assert real.tolist() == [[True] * (len(prompt) + 3) + [False] * (4 - len(prompt)) for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_lengths": [4, 1, 2], "attention_mask": padded("right")[1]}, "pass one of them"),
        ({"prompt_lengths": [4, 5, 2]}, "between 0 and 4"),
        ({"prompt_lengths": [-1, 1, 2]}, "between 0 and 4"),
    ],
)
def test_lengths_that_contradict_are_refused(model: BertForMaskedLM, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        place_prompts(Backbone(model), padded("right")[0], 3, MASK, PAD, **changes)


def test_mask_token_counts_only_inside_a_prompt(model: BertForMaskedLM) -> None:
    ids = padded("right")[0]
    ids[2, 3] = MASK  # padding
    place_prompts(Backbone(model), ids, 3, MASK, PAD, prompt_lengths=[4, 1, 2])
    ids[2, 1] = MASK
    with pytest.raises(ValueError, match=f"prompt 2 .* mask token \\({MASK}\\)"):
        place_prompts(Backbone(model), ids, 3, MASK, PAD, prompt_lengths=[4, 1, 2])


def test_guidance_doubles_rows_and_masks_second_prompts() -> None:
    ids, padding = torch.tensor([[7, 8, MASK], [9, MASK, PAD]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    level = torch.tensor([0.25, 0.75])
    is_prompt = torch.tensor([[True, True, False], [True, False, False]])
    rows, real, levels = rows_of_guidance(ids, padding, level, is_prompt, MASK)
    assert rows.tolist() == [[7, 8, MASK], [9, MASK, PAD], [MASK] * 3, [MASK, MASK, PAD]]
    assert real is not None
    assert real.tolist() == padding.tolist() * 2
    assert levels.tolist() == [0.25, 0.75, 0.25, 0.75]
    assert ids.tolist() == [[7, 8, MASK], [9, MASK, PAD]]  # unchanged
    assert rows_of_guidance(ids, None, level, is_prompt, MASK)[1] is None


def test_canvas_may_fill_exactly_the_models_positions(model: BertForMaskedLM) -> None:
    check_canvas(model, 8, POSITIONS - 8)
    with pytest.raises(ValueError, match=r"together 13, .* 12 positions.*--max_prompt_length 8"):
        check_canvas(model, 9, 4, "record 3 of file.json")
    assert checked_lengths(model, None, 4) == POSITIONS
    assert checked_lengths(model, 10, 4) == 10
    with pytest.raises(ValueError, match="max_length is 13"):
        checked_lengths(model, 13, 4)
    with pytest.raises(ValueError, match="gen_length is 12"):
        checked_lengths(model, 10, 12)
