"""Prompt embeddings against SDXL's own pipeline."""

from typing import Any

import pytest
import torch

from nara_diffusion.dreambooth.cache.prompt_embeds import PromptCache
from nara_diffusion.dreambooth.families.unet.clip import encode_prompts, encode_tokens, tokenize_prompts
from tests.helpers.small_pipelines import MAX_TOKENS, TEXT_WIDTHS, small_sdxl

PROMPTS = ["a photo of toy", "a red cube on grass", "a photo of toy"]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return small_sdxl()


def parts(pipe: Any) -> tuple[list[Any], list[Any]]:
    return [pipe.tokenizer, pipe.tokenizer_2], [pipe.text_encoder, pipe.text_encoder_2]


def test_embeddings_are_those_of_sdxl_s_pipeline(pipe) -> None:
    expected, _, pooled, _ = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    ours = encode_prompts(*parts(pipe), PROMPTS)
    assert ours[0].shape == (3, MAX_TOKENS, sum(TEXT_WIDTHS))
    assert ours[1].shape == (3, TEXT_WIDTHS[1])
    assert ours[0].equal(expected)
    assert ours[1].equal(pooled)


def test_prompts_and_their_tokens_are_encoded_alike(pipe) -> None:
    tokenizers, encoders = parts(pipe)
    tokens = tokenize_prompts(tokenizers, PROMPTS)
    assert [ids.shape for ids in tokens] == [(3, MAX_TOKENS)] * 2
    pairs = zip(encode_tokens(encoders, tokens), encode_prompts(tokenizers, encoders, PROMPTS), strict=True)
    assert all(one.equal(other) for one, other in pairs)


def test_gradients_reach_both_encoders(pipe) -> None:
    tokenizers, encoders = parts(pipe)
    embeds, pooled = encode_prompts(tokenizers, encoders, PROMPTS)
    weights = [encoder.get_input_embeddings().weight for encoder in encoders]
    gradients = torch.autograd.grad(embeds.square().sum() + pooled.square().sum(), weights)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_the_cache_gives_the_same_and_encodes_each_prompt_once(pipe, monkeypatch) -> None:
    calls: list[int] = []
    forward = pipe.text_encoder.forward

    def count(ids: torch.Tensor, **options: Any) -> Any:
        calls.append(len(ids))
        return forward(ids, **options)

    monkeypatch.setattr(pipe.text_encoder, "forward", count)
    cache = PromptCache(*parts(pipe))
    cache.fill(PROMPTS, progress=False)
    embeds, pooled = cache.get(PROMPTS)
    assert calls == [1, 1]
    expected = encode_prompts(*parts(pipe), PROMPTS)
    torch.testing.assert_close(embeds, expected[0])
    torch.testing.assert_close(pooled, expected[1])
    assert not embeds.requires_grad
    assert embeds[0].equal(embeds[2])
    assert not embeds[0].equal(embeds[1])


def test_bits_do_not_depend_on_the_prompts_beside_it(pipe) -> None:
    together = PromptCache(*parts(pipe)).get(PROMPTS)
    alone = PromptCache(*parts(pipe)).get(PROMPTS[1:2])
    assert together[0][1:2].equal(alone[0])
    assert together[1][1:2].equal(alone[1])


def test_a_bound_and_a_disk_change_nothing(pipe, tmp_path) -> None:
    expected = PromptCache(*parts(pipe)).get(PROMPTS)
    for memory in (0.0, None):
        for _ in range(2):
            cached = PromptCache(*parts(pipe), memory_mib=memory, folder=tmp_path / "cache").get(PROMPTS)
            assert all(one.equal(other) for one, other in zip(cached, expected, strict=True))
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_other_encoders_find_nothing_of_the_first_on_disk(pipe, tmp_path) -> None:
    PromptCache(*parts(pipe), folder=tmp_path).get(PROMPTS)
    other = small_sdxl()
    with torch.no_grad():
        other.text_encoder_2.text_projection.weight.mul_(1.5)
    pooled = PromptCache(*parts(other), folder=tmp_path).get(PROMPTS)[1]
    assert pooled.equal(PromptCache(*parts(other)).get(PROMPTS)[1])
    assert not pooled.equal(PromptCache(*parts(pipe)).get(PROMPTS)[1])


def test_a_prompt_that_is_cut_is_told_once(pipe, caplog) -> None:
    cache = PromptCache(*parts(pipe))
    long = " ".join(["toy"] * 20)
    cache.get([long])
    cache.get([long, PROMPTS[0]])
    assert caplog.text.count("has 22 tokens; the text encoders read 12, the rest is ignored") == 1


def test_nan_of_the_encoders_is_refused() -> None:
    pipe = small_sdxl()
    with torch.no_grad():
        pipe.text_encoder_2.text_projection.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="the text encoders give NaN or infinity for 'a photo of toy'"):
        PromptCache(*parts(pipe)).get(PROMPTS)
