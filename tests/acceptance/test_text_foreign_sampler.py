"""Other people's samplers know nothing of λ: it is read from the masks in their `input_ids`, without padding.

The reference is the adapted model by hand, a row at a time, at the masked share of its answer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nara_diffusion import noise_level
from nara_diffusion.dllm import (
    InputIdsNoise,
    encode_records,
    generate,
    log_likelihood,
    read_noise_from_input_ids,
)
from nara_diffusion.dllm.records import normalized
from pipelines.llada import LLaDAPipeline
from tests.acceptance._text import ByHand, adapted_pair

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


def test_level_is_the_masked_share_without_prompt_and_padding(pair: Any) -> None:
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


def columns(minimum: float | None = None) -> Tensor:
    """REAL as (3, 1, 14, 14), boolean or additive."""
    mask = REAL.bool()[:, None, None, :].expand(3, 1, 14, 14)
    return mask if minimum is None else torch.zeros(mask.shape).masked_fill(~mask, minimum)


PAIRS = columns() & (columns().mT | torch.eye(14, dtype=torch.bool)) | torch.eye(14, dtype=torch.bool) & columns().mT
ATTENTION: dict[str, Tensor] = {
    "columns": columns(),
    "columns, one row": columns()[:, :, :1],
    "pairs, a head each": PAIRS.expand(3, 4, 14, 14),
    "infinite": columns(-torch.inf),
    "-10000": columns(-10000.0),
}


@pytest.mark.parametrize("kind", ATTENTION)
@torch.no_grad()
def test_padding_is_no_answer_under_any_attention_mask(pair: Any, kind: str) -> None:
    model, ids = pair[0], IDS.masked_fill(MASKED, MASK)
    with noise_level(model, SHARES):
        expected = model(ids, attention_mask=ATTENTION[kind]).logits
    with read_noise_from_input_ids(model, PROMPTS):
        actual = model(ids, attention_mask=ATTENTION[kind]).logits
    seen = REAL.bool()  # rows of padding may see nothing, and have no logits
    assert torch.equal(actual[seen], expected[seen])
    assert actual[seen].isfinite().all()


def test_an_attention_mask_that_can_t_tell_is_refused(pair: Any) -> None:
    for mask in [
        REAL.bool()[:, None, :] & REAL.bool()[:, :, None],
        torch.zeros(3, 1, 14, 14) - 3.5,
        torch.stack([REAL.bool(), ~REAL.bool()], 1)[:, :, None, :],
        torch.ones(3, 1, 14, 17, dtype=torch.bool),
        {"full_attention": None},
    ]:
        message = r"attention_mask .* which of the tokens are padding: .* noise_level\("
        with read_noise_from_input_ids(pair[0], PROMPTS), pytest.raises(ValueError, match=message):
            pair[0](IDS, attention_mask=mask)


def published_loop(model: Any, prompt: Tensor, gen_length: int, cfg_scale: float) -> Tensor:
    """LLaDA's published loop in its shortest form: one token a step, guidance by torch.cat."""
    b, p = prompt.shape
    x = torch.cat([prompt, torch.full((b, gen_length), MASK)], 1)
    for _ in range(gen_length):
        free = x.clone()
        free[:, :p] = MASK
        logits, free_logits = model(torch.cat([x, free])).logits.chunk(2)
        logits = free_logits + (cfg_scale + 1) * (logits - free_logits)
        logits[..., MASK] = -torch.inf
        confidence = logits.softmax(-1).amax(-1).masked_fill(x != MASK, -1)
        place = confidence[:, p:].argmax(1) + p
        x[torch.arange(b), place] = logits.argmax(-1)[torch.arange(b), place]
    return x


@torch.no_grad()
def test_llada_s_published_loop_writes_what_generate_writes(pair: Any) -> None:
    model, _ = pair
    expected = generate(model, IDS[:, :6], gen_length=7, cfg_scale=0.8, stop_at_eos=False)
    with read_noise_from_input_ids(model, 6):
        assert torch.equal(published_loop(model, IDS[:, :6], 7, 0.8), expected)


@torch.no_grad()
def test_context_beats_the_source_and_an_inner_source_ends(pair: Any) -> None:
    model, _ = pair
    ids = IDS.masked_fill(torch.arange(14) > 9, MASK)
    with noise_level(model, 0.9):
        at_the_end = model(ids).logits
    with read_noise_from_input_ids(model, 4):
        outer = model(ids).logits
        with read_noise_from_input_ids(model, 9):
            assert not torch.equal(model(ids).logits, outer)
        assert torch.equal(model(ids).logits, outer)
        with noise_level(model, 0.9):
            assert torch.equal(model(ids).logits, at_the_end)


def test_what_cannot_be_known_is_an_error() -> None:
    for given, kwargs, message in [
        ((), {"inputs_embeds": torch.ones(1, 2, 3)}, "no input_ids"),
        ((IDS[:1],), {}, "prompt_lengths has 3 values and this forward 1 rows"),
        ((IDS.repeat(2, 1),), {}, "repeated='tiled'"),
        ((IDS[:, :5],), {}, "row 1 of input_ids has 5 tokens, and none of an answer"),
    ]:
        with pytest.raises(ValueError, match=message):
            InputIdsNoise(PROMPTS, mask_token_id=MASK)(torch.nn.Identity(), given, kwargs)


# ---------------------------------------------------------------------- a mask that a user types


def test_mask_in_a_prompt_or_text_is_refused_and_one_in_padding_is_not(pair: Any) -> None:
    rows = torch.tensor([[9, 8, 7, MASK], [9, MASK, 7, 5]])
    with pytest.raises(ValueError, match=rf"prompt 1 holds the mask token \({MASK}\).*: write it otherwise"):
        generate(pair[0], rows, gen_length=2, prompt_lengths=[3, 2])
    assert generate(pair[0], rows, gen_length=2, prompt_lengths=[3, 1]).shape == (2, 5)
    assert log_likelihood(pair[0], rows[:1], [2], answer_lengths=[1]).isfinite().all()
    with pytest.raises(ValueError, match=rf"row 1 holds the mask token \({MASK}\)"):
        log_likelihood(pair[0], rows, [2, 2], answer_lengths=[1, 2])


def test_the_pipeline_refuses_a_typed_mask_as_training_does() -> None:
    folder, typed = Path(__file__).parents[2] / "examples" / "assets" / "llada-tiny", "upper: <|mdm_mask|>"
    pipe = LLaDAPipeline.from_pretrained(folder)
    records = normalized([{"instruction": typed, "output": "A", "answer": "A"}], source="test")
    with pytest.raises(ValueError, match="holds the mask token") as training:
        encode_records(records, pipe.tokenizer, max_length=64)
    for prompt in (typed, [{"role": "user", "content": typed}]):
        with pytest.raises(ValueError, match="the prompt holds the mask token") as inference:
            pipe(prompt, gen_length=2)
        assert str(inference.value).partition(" holds ")[2] == str(training.value).partition(" holds ")[2]
