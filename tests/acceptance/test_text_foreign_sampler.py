"""Other people's samplers know nothing of λ: it is read from the masks in their `input_ids`, without padding.

The reference is the adapted model by hand, a row at a time, at the masked share of its answer.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nara_diffusion import noise_level
from nara_diffusion.dllm import (
    InputIdsNoise,
    generate,
    log_likelihood,
    read_noise_from_input_ids,
)
from pipelines.llada import LLaDAPipeline
from tests.acceptance._text import LLADA_TINY, ByHand, adapted_pair

VOCABULARY = 40
MASK = VOCABULARY - 1
IDS = torch.randint(6, MASK, (3, 14), generator=torch.Generator().manual_seed(0))
PROMPTS, ENDS = [3, 6, 1], [14, 9, 12]
REAL = (torch.arange(14) < torch.tensor(ENDS)[:, None]).long()
MASKED = torch.zeros(3, 14, dtype=torch.bool)
MASKED[0, [3, 4, 9]] = MASKED[1, [6]] = MASKED[2, [2, 3, 5, 8, 11]] = True
SHARES = (3 / 11, 1 / 3, 5 / 11)


@pytest.fixture(scope="module")
def pair() -> tuple[Any, ByHand]:
    return adapted_pair(VOCABULARY)


def test_level_is_masked_share_without_prompt_and_padding(pair: Any) -> None:
    model, by_hand = pair
    seen = IDS.masked_fill(MASKED, MASK)
    seen[1, 9:] = MASK  # padding, which a sampler may fill with anything
    blind = seen.clone()
    for row, start in enumerate(PROMPTS):
        blind[row, :start] = MASK  # as guidance does
    with read_noise_from_input_ids(model, prompt_lengths=PROMPTS, repeated="tiled"), torch.no_grad():
        output = model(torch.cat([seen, blind]), attention_mask=REAL.repeat(2, 1)).logits.double()
    for half, ids in enumerate((seen, blind)):
        for row, (end, level) in enumerate(zip(ENDS, SHARES, strict=True)):
            expected = by_hand([ids[row, :end].tolist()], level)[0]
            torch.testing.assert_close(output[3 * half + row, :end], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="λ is not known"):
        model(seen)


def test_repeated_rows_have_the_levels_of_theirs() -> None:
    seen = IDS.masked_fill(MASKED, MASK)
    for repeated, rows in (("tiled", [0, 1, 2, 0, 1, 2]), ("interleaved", [0, 0, 1, 1, 2, 2])):
        source = InputIdsNoise(PROMPTS, mask_token_id=MASK, repeated=repeated)
        actual = source(torch.nn.Identity(), (seen[rows],), {"attention_mask": REAL[rows]})
        assert actual.tolist() == pytest.approx([SHARES[row] for row in rows])


@torch.no_grad()
def test_padding_is_no_answer(pair: Any) -> None:
    model, ids = pair[0], IDS.masked_fill(MASKED, MASK)
    with noise_level(model, SHARES):
        expected = model(ids, attention_mask=REAL).logits
    with read_noise_from_input_ids(model, PROMPTS):
        assert torch.equal(model(ids, attention_mask=REAL).logits, expected)


def test_ambiguous_attention_mask_is_refused(pair: Any) -> None:
    for mask in [
        REAL.bool()[:, None, :] & REAL.bool()[:, :, None],
        torch.ones(3, 1, 14, 14, dtype=torch.bool),
        {"full_attention": None},
    ]:
        message = r"attention_mask is .* which tokens are padding: .* noise_level\("
        with read_noise_from_input_ids(pair[0], PROMPTS), pytest.raises(ValueError, match=message):
            pair[0](IDS, attention_mask=mask)


def test_unknown_level_raises_naming_its_readers(pair: Any) -> None:
    with pytest.raises(ValueError, match=r"read_noise_from_input_ids\(model, prompt_lengths\)"):
        pair[0](IDS)


@torch.no_grad()
def test_context_overrides_source_and_inner_source_ends(pair: Any) -> None:
    """Of 10 tokens of an answer, or of 5, four are masked."""
    model, by_hand = pair
    ids = IDS.masked_fill(torch.arange(14) > 9, MASK)

    def check(level: float) -> None:
        torch.testing.assert_close(model(ids).logits.double(), by_hand(ids.tolist(), level), rtol=1e-4, atol=1e-4)

    with read_noise_from_input_ids(model, 4):
        check(4 / 10)
        with read_noise_from_input_ids(model, 9):
            check(4 / 5)
        check(4 / 10)
        with noise_level(model, 0.9):
            check(0.9)


def test_what_cannot_be_known_is_an_error() -> None:
    for ids, kwargs, message in [
        ((), {"inputs_embeds": torch.ones(1, 2, 3)}, "no input_ids"),
        ((IDS[:1],), {}, "prompt_lengths has 3 values and this forward 1 rows"),
        ((IDS.repeat(2, 1),), {}, "repeated='tiled'"),
        ((IDS[:, :5],), {}, "none of the 5 tokens in row 1 of input_ids belongs"),
        ((IDS,), {"past_key_values": SimpleNamespace(get_seq_length=lambda: 5)}, "continue a cache"),
    ]:
        with pytest.raises(ValueError, match=message):
            InputIdsNoise(PROMPTS, mask_token_id=MASK)(torch.nn.Identity(), ids, kwargs)


# ---------------------------------------------------------------------- a mask that a user types


def test_mask_is_refused_in_text_not_in_padding(pair: Any) -> None:
    rows = torch.tensor([[9, 8, 7, MASK], [9, MASK, 7, 5]])
    with pytest.raises(ValueError, match=rf"prompt 1 holds the mask token \({MASK}\).*: write it otherwise"):
        generate(pair[0], rows, gen_length=2, prompt_lengths=[3, 2])
    assert generate(pair[0], rows, gen_length=2, prompt_lengths=[3, 1]).shape == (2, 5)
    assert log_likelihood(pair[0], rows[:1], [2], answer_lengths=[1]).isfinite().all()
    with pytest.raises(ValueError, match=rf"row 1 holds the mask token \({MASK}\)"):
        log_likelihood(pair[0], rows, [2, 2], answer_lengths=[1, 2])
    pipe, typed = LLaDAPipeline.from_pretrained(LLADA_TINY), "upper: <|mdm_mask|>"
    for prompt in (typed, [{"role": "user", "content": typed}]):
        with pytest.raises(ValueError, match="the prompt holds the mask token"):
            pipe(prompt, gen_length=2)
