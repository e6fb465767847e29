"""What generation refuses, and how it says so."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from nara_diffusion.dllm import GenerationStep, generate

MASK = 49


@pytest.fixture
def prompts() -> torch.Tensor:
    return torch.randint(0, MASK, (3, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda sequences: sequences[:, 1:], r"left sequences of shape \(3, 14\)"),
        (lambda sequences: sequences.float(), "torch.float32"),
        (lambda sequences: torch.full_like(sequences, MASK), "put masks where the answer has tokens already"),
    ],
)
def test_spoiled_sequences_are_refused(tiny_llama: LlamaForCausalLM, prompts: torch.Tensor, spoil, message) -> None:
    def change(step: GenerationStep) -> None:
        step.sequences = spoil(step.sequences)

    with pytest.raises(ValueError, match=message):
        generate(tiny_llama, prompts, gen_length=8, on_step_end=change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gen_length": 0}, "gen_length is 0"),
        ({"block_length": 3}, "block_length 3 doesn't divide gen_length 8"),
        ({"block_length": 4, "steps": 3}, "steps is 3 and there are 2 blocks: pass a multiple of 2"),
        ({"block_length": 2, "steps": 2}, "steps is 2 and there are 4 blocks"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"cfg_scale": -1.0}, "cfg_scale is -1.0"),
        ({"remasking": "high"}, "remasking is 'high', expected one of 'low_confidence', 'random'"),
        ({"confidence_threshold": 1.5}, "confidence_threshold is 1.5"),
        ({"confidence_threshold": 0.9, "steps": 8}, "leave out steps"),
        ({"confidence_threshold": 0.9, "remasking": "random"}, "use remasking='low_confidence'"),
        ({"gen_length": 58}, "the longest prompt has 7 tokens and gen_length is 58, together 65, and the model has 64"),
        ({"prompt_lengths": [1, 2]}, "prompt_lengths is"),
        ({"prompt_lengths": [1, 2, 8]}, "between 0 and 7"),
        ({"prompt_lengths": [1, 2, 3], "attention_mask": torch.ones(3, 7)}, "pass one of them"),
        ({"attention_mask": torch.ones(3, 6)}, "attention_mask has shape"),
        ({"input_ids": torch.ones(7, dtype=torch.long)}, "input_ids has shape"),
        ({"input_ids": torch.ones(3, 7, dtype=torch.bool)}, r"torch.bool, expected \(b, p\) token ids"),
        ({"input_ids": torch.ones(0, 7, dtype=torch.long)}, "input_ids has shape"),
    ],
)
def test_impossible_arguments(
    tiny_llama: LlamaForCausalLM, prompts: torch.Tensor, arguments: dict, message: str
) -> None:
    arguments = {"input_ids": prompts, "gen_length": 8, **arguments}
    with pytest.raises(ValueError, match=message):
        generate(tiny_llama, **arguments)


def test_a_model_without_mask_token_is_told_how_to_name_one(
    tiny_llama: LlamaForCausalLM, prompts: torch.Tensor
) -> None:
    del tiny_llama.config.mask_token_id
    with pytest.raises(ValueError, match=r"no mask_token_id.*pass mask_token_id=N"):
        generate(tiny_llama, prompts)
    assert generate(tiny_llama, prompts, gen_length=2, mask_token_id=MASK).shape == (3, 9)
