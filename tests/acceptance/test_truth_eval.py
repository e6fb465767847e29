"""Dream, whose logits are those of the next token, begins an empty context with BOS; nara-eval's 4 bits are QLoRA's.

The reference is stock Qwen2 with the same weights, whose logits at position i are token i + 1's.
"""

from __future__ import annotations

from itertools import combinations
from math import comb
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2ForCausalLM

from nara_diffusion.dllm import Generation, generate, load_backbone, log_likelihood
from tests.acceptance._text import greedy

DREAM_TINY = str(Path(__file__).parents[2] / "examples" / "assets" / "dream-tiny")
MASK, BOS = 283, 278


@pytest.fixture(scope="module")
def dream() -> Any:
    return load_backbone(DREAM_TINY)[0].eval()


@pytest.fixture(scope="module")
def stock() -> Any:
    return Qwen2ForCausalLM.from_pretrained(DREAM_TINY).eval()


@torch.no_grad()
def log_p(stock: Any, tokens: list[int]) -> torch.Tensor:
    """Of token i at position i; nothing tells the first."""
    logits = stock(torch.tensor([tokens])).logits[0].double()
    return torch.cat([torch.full_like(logits[:1], float("nan")), logits[:-1]]).log_softmax(-1)


class ByHand:
    """The logits of answers, for `greedy`."""

    def __init__(self, stock: Any) -> None:
        self.stock = stock

    def guided(self, prompt: list[int], answer: list[int], scale: float, mask: int) -> torch.Tensor:
        logits = log_p(self.stock, prompt + answer)[len(prompt) :]
        logits[:, mask] = -torch.inf
        return logits


def bound(stock: Any, prompt: list[int], answer: list[int]) -> float:
    n, total = len(answer), 0.0
    for k in range(1, n + 1):
        for subset in combinations(range(n), k):
            shown = [MASK if j in subset else token for j, token in enumerate(answer)]
            found = log_p(stock, prompt + shown)
            total += sum(found[len(prompt) + j, answer[j]].item() for j in subset) / k / comb(n, k)
    return total


def test_the_likelihood_of_an_answer_without_a_prompt(dream: Any, stock: Any) -> None:
    rows = torch.tensor([[70, 71, 72, 0, 0], [9, 8, 75, 76, 77], [73, 0, 0, 0, 0]])
    actual = log_likelihood(dream, rows, [0, 2, 0], answer_lengths=[3, 3, 1])
    expected = [
        bound(stock, [BOS], [70, 71, 72]),
        bound(stock, [9, 8], [75, 76, 77]),
        bound(stock, [BOS], [73]),
    ]
    assert actual.tolist() == pytest.approx(expected, rel=1e-5)


def test_an_answer_to_an_empty_prompt(dream: Any, stock: Any) -> None:
    prompts = torch.tensor([[5, 5, 5], [9, 8, 7]])
    result = generate(dream, prompts, gen_length=4, prompt_lengths=[0, 3], stop_at_eos=False, return_stats=True)
    assert isinstance(result, Generation)
    assert result.prompt_lengths.tolist() == [1, 3]
    options = {"gen_length": 4, "steps": 4, "block_length": 4, "mask": MASK}
    for row, prompt in zip(range(2), ([BOS], [9, 8, 7]), strict=True):
        expected, _ = greedy(ByHand(stock), prompt, **options)
        assert result.answers[row].tolist() == expected
        assert result.sequences[row, : len(prompt) + 4].tolist() == prompt + expected
    nothing = torch.zeros(2, 0, dtype=torch.long)
    alone = generate(dream, nothing, gen_length=4, stop_at_eos=False)
    assert isinstance(alone, torch.Tensor)
    assert alone.tolist() == [result.sequences[0, :5].tolist()] * 2


def test_without_a_bos_token_it_is_refused(dream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dream.config, "bos_token_id", None)
    message = "an empty prompt, .* predicts the next token, .* bos_token_id: begin the prompt with a token"
    with pytest.raises(ValueError, match=message):
        log_likelihood(dream, torch.tensor([[70, 71]]), [0])
    with pytest.raises(ValueError, match=message):
        generate(dream, torch.zeros(1, 0, dtype=torch.long), gen_length=2)


# ---------------------------------------------------------------------- nara-eval


@pytest.fixture(scope="module")
def harness() -> Any:
    pytest.importorskip("lm_eval")
    from nara_diffusion.lm_eval.harness_model import NaraDLLM

    return NaraDLLM(DREAM_TINY, device="cpu", batch_size=2, samples=64)


def requests(kind: str, *arguments: tuple) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, doc={}, arguments=args, idx=i, metadata=("t", i, 1)) for i, args in enumerate(arguments)]


def test_nara_eval_puts_a_bos_before_texts_as_dream_s_own_evaluation(harness: Any, stock: Any) -> None:
    ids = harness.tokenizer("upper: ab").input_ids
    pairs = [("", "ab"), ("upper: a", "b"), ("<|startoftext|>", "ab")]
    likelihoods = harness.loglikelihood(requests("loglikelihood", *pairs))
    expected = [bound(stock, [BOS], ids[-2:]), bound(stock, [BOS, *ids[:3]], ids[3:]), bound(stock, [BOS], ids[-2:])]
    assert [value for value, _ in likelihoods] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="loglikelihood_rolling"):
        harness.loglikelihood_rolling(requests("loglikelihood_rolling", ("upper: ab",)))
    options = {"gen_length": 4, "steps": 4, "block_length": 4, "mask": MASK, "ends": tuple(harness.ends)}
    for text in ("", "upper: ab"):
        prompt = [BOS, *(ids if text else [])]
        expected, _ = greedy(ByHand(stock), prompt, **options)
        (answer,) = harness.generate_until(requests("generate_until", (text, {"gen_length": 4})))
        length = next((i for i, token in enumerate(expected) if token in harness.ends), 4)
        assert answer == harness.tokenizer.decode(expected[:length], skip_special_tokens=True)


LLADA_TINY = str(Path(__file__).parents[2] / "examples" / "assets" / "llada-tiny")


def test_weights_are_rounded_to_nf4_with_double_quantisation() -> None:
    pytest.importorskip("lm_eval")
    bnb = pytest.importorskip("bitsandbytes.functional")
    from nara_diffusion.lm_eval.harness_model import NaraDLLM

    small: Any = NaraDLLM(LLADA_TINY, device="cpu", load_in_4bit=True, dtype="float32").model
    whole, _ = load_backbone(LLADA_TINY)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        rounded, weight = small.get_submodule(name).weight, whole.get_submodule(name).weight.detach()
        expected = bnb.dequantize_4bit(*bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True))
        assert torch.equal(bnb.dequantize_4bit(rounded.data, rounded.quant_state), expected)
        assert (rounded.quant_state.quant_type, rounded.quant_state.nested) == ("nf4", True)
