"""`generate` against the plain-loop reference, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from nara_diffusion import noise_level
from nara_diffusion.dllm import generate

from .generation_reference import reference_generate

MASK = 49
PROMPT_LENGTHS = [3, 7, 5]
ENDS = tuple(range(10, 22))  # many, so that a random model meets one


@pytest.fixture
def prompts() -> torch.Tensor:
    return torch.randint(0, MASK, (3, 7), generator=torch.Generator().manual_seed(1))


def draws(seed: int, forwards: int, block: int, *, temperature: float, remasking: str):
    """The uniform numbers of each step, in the order that the sampler takes them from a generator."""
    generator = torch.Generator().manual_seed(seed)
    steps = []
    for _ in range(forwards):
        step = {}
        if temperature > 0:
            step["gumbel"] = torch.rand((3, block, MASK + 1), dtype=torch.float64, generator=generator)
        if remasking == "random":
            step["random"] = torch.rand((3, block), generator=generator)
        steps.append(step)
    return steps


CASES = [
    {"gen_length": 8, "steps": 8, "block_length": 4},
    {"gen_length": 8, "steps": 4, "block_length": 8},
    {"gen_length": 12, "steps": 6, "block_length": 4, "cfg_scale": 1.5},
    {"gen_length": 8, "steps": 6, "block_length": 4, "remasking": "random"},
    {"gen_length": 8, "steps": 8, "block_length": 4, "temperature": 0.7},
    {"gen_length": 9, "steps": 6, "block_length": 3, "temperature": 1.0, "remasking": "random", "cfg_scale": 0.5},
    {"gen_length": 8, "steps": 16, "block_length": 4},
    {"gen_length": 8, "steps": None, "block_length": 4, "confidence_threshold": 0.05},
    {"gen_length": 6, "steps": None, "block_length": 6, "confidence_threshold": 0.03, "temperature": 0.5},
]


@pytest.mark.parametrize("ends", [(), ENDS], ids=["no-eos", "eos"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(f"{value}" for value in case.values()))
def test_equals_the_plain_loops_in_float64(double_llama: LlamaForCausalLM, prompts: torch.Tensor, case, ends) -> None:
    result = generate(
        double_llama,
        prompts,
        **case,
        prompt_lengths=PROMPT_LENGTHS,
        generator=torch.Generator().manual_seed(5),
        eos_token_id=ends or None,
        stop_at_eos=bool(ends),
        return_stats=True,
    )
    _check(result, prompts, case, ends, lambda tokens, level: double_llama(torch.tensor([tokens])).logits[0])


@pytest.mark.parametrize("case", [CASES[2], CASES[7]], ids=["cfg", "threshold"])
def test_each_sample_is_denoised_at_its_own_noise_level(adapted_llama: PeftModel, prompts: torch.Tensor, case) -> None:
    model = adapted_llama

    def logits_of(tokens: list[int], level: float) -> torch.Tensor:
        with noise_level(model, level):
            return model(torch.tensor([tokens])).logits[0].double()

    result = generate(model, prompts, **case, prompt_lengths=PROMPT_LENGTHS, eos_token_id=ENDS, return_stats=True)
    _check(result, prompts, case, ENDS, logits_of)


@torch.no_grad()
def _check(result, prompts: torch.Tensor, case, ends, logits_of) -> None:
    longest = 0
    for row, length in enumerate(PROMPT_LENGTHS):
        prompt = prompts[row, :length].tolist()
        options = {"temperature": case.get("temperature", 0.0), "remasking": case.get("remasking", "low_confidence")}
        steps = draws(5, 40, case["block_length"], **options)
        settings = {key: value for key, value in case.items() if key not in ("confidence_threshold", "steps")}
        answer, levels = reference_generate(
            logits_of,
            prompt,
            **settings,
            steps=case["steps"] or case["gen_length"],
            threshold=case.get("confidence_threshold"),
            mask=MASK,
            ends=ends,
            uniform=lambda kind, number, row=row, steps=steps: steps[number][kind][row],
        )
        assert result.answers[row].tolist() == answer
        assert result.sequences[row, : length + len(answer)].tolist() == prompt + answer
        longest = max(longest, len(levels))
    assert result.forwards == longest
