"""λ read from input_ids: in plain forwards, in a foreign sampler with guidance, and what it refuses to guess."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import DynamicCache, LlamaForCausalLM

from nara_diffusion import NaraConfig, noise_level
from nara_diffusion.dllm import InputIdsNoise, generate, mask_density, read_noise_from_input_ids

from .conftest import disturb

MASK = 49
PROMPT_LENGTHS = [3, 5]
INPUT_IDS = torch.tensor(
    [
        [4, 5, 6, MASK, 8, MASK, MASK, 9, 10, 2, 2],
        [4, MASK, 6, 5, 4, MASK, 8, 9, 3, MASK, MASK],
    ]
)
ATTENTION_MASK = torch.tensor([[1] * 9 + [0] * 2, [1] * 11])


def told(model: torch.nn.Module, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(INPUT_IDS, attention_mask=ATTENTION_MASK, **kwargs).logits


def at(model: torch.nn.Module, levels: torch.Tensor) -> torch.Tensor:
    with noise_level(model, levels):
        return told(model)


def test_prompt_and_padding_don_t_count(adapted_llama: PeftModel) -> None:
    read_noise_from_input_ids(adapted_llama, PROMPT_LENGTHS)
    with torch.no_grad():
        for inputs in (
            {"args": (INPUT_IDS, ATTENTION_MASK)},
            {"kwargs": {"input_ids": INPUT_IDS, "attention_mask": ATTENTION_MASK}},
        ):
            actual = adapted_llama(*inputs.get("args", ()), **inputs.get("kwargs", {})).logits
            assert torch.equal(actual, at(adapted_llama, torch.tensor([3 / 6, 3 / 6])))
        without_padding = adapted_llama(INPUT_IDS).logits
        with noise_level(adapted_llama, torch.tensor([3 / 8, 3 / 6])):
            assert torch.equal(without_padding, adapted_llama(INPUT_IDS).logits)
    source = InputIdsNoise(PROMPT_LENGTHS, mask_token_id=MASK, answer_lengths=[4, 6])
    assert source(adapted_llama, (INPUT_IDS,), {}).noise_level.tolist() == [3 / 4, 3 / 6]


def test_noise_level_beats_the_source_and_the_block_ends(adapted_llama: PeftModel) -> None:
    with read_noise_from_input_ids(adapted_llama, PROMPT_LENGTHS) as outer:
        told(adapted_llama)
        with read_noise_from_input_ids(adapted_llama, 0):
            inner = InputIdsNoise(0, mask_token_id=MASK)(adapted_llama, (INPUT_IDS, ATTENTION_MASK), {}).noise_level
            assert torch.equal(told(adapted_llama), at(adapted_llama, inner))
        assert torch.equal(told(adapted_llama), at(adapted_llama, torch.tensor([0.5, 0.5])))
        assert not torch.equal(at(adapted_llama, torch.tensor([0.9, 0.9])), told(adapted_llama))
        outer.remove()
        with pytest.raises(ValueError, match="λ is not known"):
            told(adapted_llama)
    with pytest.raises(ValueError, match="λ is not known"):
        told(adapted_llama)


def foreign_sampler(model, prompt: torch.Tensor, gen_length: int, cfg_scale: float) -> torch.Tensor:
    """LLaDA's published loop in its shortest form: one token a step, guidance by torch.cat; it knows nothing of λ."""
    b, p = prompt.shape
    x = torch.cat([prompt, torch.full((b, gen_length), MASK)], 1)
    for _ in range(gen_length):
        free = x.clone()
        free[:, :p] = MASK
        logits, free_logits = model(torch.cat([x, free])).logits.chunk(2)
        logits = free_logits + (cfg_scale + 1) * (logits - free_logits)
        logits[..., MASK] = -torch.inf
        tokens = logits.argmax(-1)
        confidence = logits.softmax(-1).amax(-1).masked_fill(x != MASK, -1)
        place = confidence[:, p:].argmax(1) + p
        x[torch.arange(b), place] = tokens[torch.arange(b), place]
    return x


@torch.no_grad()
def test_somebody_else_s_sampler_gives_what_ours_gives(adapted_llama: PeftModel) -> None:
    prompts = torch.randint(2, MASK, (3, 6), generator=torch.Generator().manual_seed(2))
    expected = generate(adapted_llama, prompts, gen_length=7, cfg_scale=0.8, stop_at_eos=False)
    with read_noise_from_input_ids(adapted_llama, 6):
        assert torch.equal(foreign_sampler(adapted_llama, prompts, 7, 0.8), expected)


def test_repeated_rows_follow_the_stated_rule() -> None:
    model = torch.nn.Identity()
    signals = [
        InputIdsNoise(PROMPT_LENGTHS, mask_token_id=MASK, repeated="tiled")(model, (INPUT_IDS.repeat(3, 1),), {}),
        InputIdsNoise(PROMPT_LENGTHS, mask_token_id=MASK, repeated="interleaved")(
            model, (INPUT_IDS.repeat_interleave(3, 0),), {}
        ),
    ]
    once = InputIdsNoise(PROMPT_LENGTHS, mask_token_id=MASK)(model, (INPUT_IDS,), {}).noise_level
    assert torch.equal(signals[0].noise_level, once.repeat(3))
    assert torch.equal(signals[1].noise_level, once.repeat_interleave(3))
    equal = InputIdsNoise([3, 3], mask_token_id=MASK)(model, (INPUT_IDS.repeat(2, 1),), {}).noise_level
    assert torch.equal(equal, InputIdsNoise(3, mask_token_id=MASK)(model, (INPUT_IDS,), {}).noise_level.repeat(2))


@pytest.mark.parametrize("core_input", ["mask_density", "both"])
def test_the_mask_density_is_read_too(tiny_llama: LlamaForCausalLM, core_input: str) -> None:
    config = NaraConfig(
        r=3, target_modules=["q_proj"], core_hidden_dims=(8, 8), core_input=core_input, mask_density_radius=2
    )
    model = get_peft_model(tiny_llama, config)
    disturb(model)
    model.eval()
    answer = (torch.arange(11) >= torch.tensor(PROMPT_LENGTHS)[:, None]) & ATTENTION_MASK.bool()
    masked = answer & (INPUT_IDS == MASK)
    density = mask_density(masked, answer, 2)
    with noise_level(model, torch.tensor([0.5, 0.5]), mask_density=density):
        expected = told(model)
    with read_noise_from_input_ids(model, PROMPT_LENGTHS):
        assert torch.equal(told(model), expected)
    with noise_level(model, torch.tensor([0.5, 0.5]), mask_density=1 - density):
        assert not torch.equal(told(model), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda source: source(None, (), {"inputs_embeds": torch.ones(1, 2, 3)}), "no input_ids"),
        (lambda source: source(None, (INPUT_IDS[:1],), {}), "prompt_lengths has 2 values and this forward 1 rows"),
        (lambda source: source(None, (INPUT_IDS.repeat(2, 1),), {}), "repeated='tiled'"),
        (
            lambda source: source(None, (INPUT_IDS[:, :5],), {}),
            "row 1 of input_ids has 5 tokens, and none of an answer",
        ),
    ],
)
def test_what_can_t_be_known_is_an_error(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(InputIdsNoise(PROMPT_LENGTHS, mask_token_id=MASK))


def test_input_that_continues_a_cache_is_refused(tiny_llama: LlamaForCausalLM) -> None:
    cache = DynamicCache()
    cache.update(torch.ones(2, 2, 4, 6), torch.ones(2, 2, 4, 6), 0)
    source = InputIdsNoise(PROMPT_LENGTHS, mask_token_id=MASK)
    with pytest.raises(ValueError, match="continue a cache"):
        source(tiny_llama, (INPUT_IDS,), {"past_key_values": cache})
    assert len(source(tiny_llama, (INPUT_IDS,), {"past_key_values": DynamicCache()}).noise_level) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_lengths": -1}, "prompt_lengths is"),
        ({"prompt_lengths": [0.5]}, "expected whole numbers"),
        ({"prompt_lengths": 1, "repeated": "twice"}, "repeated is 'twice'"),
    ],
)
def test_refusals(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InputIdsNoise(**options, mask_token_id=MASK)


def test_a_model_without_adapter_is_refused(tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="holds no NaRA adapter"):
        read_noise_from_input_ids(tiny_llama, 3)
