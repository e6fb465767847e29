"""The mask token that a user types into a prompt is refused, as it is in records to train on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nara_diffusion.dllm import encode_records, generate, load_backbone, log_likelihood
from nara_diffusion.dllm.data.records import normalized
from pipelines.llada import LLaDAPipeline

LLADA_TINY = Path(__file__).parents[2] / "examples" / "assets" / "llada-tiny"
MASK, TYPED = 283, "<|mdm_mask|>"


def test_generate_refuses_a_mask_in_a_prompt() -> None:
    model, _ = load_backbone(str(LLADA_TINY))
    prompts = torch.tensor([[9, 8, 7, 5], [9, MASK, 7, MASK]])
    with pytest.raises(ValueError, match=r"prompt 1 holds the mask token \(283\).*: write it otherwise"):
        generate(model, prompts, gen_length=2, prompt_lengths=[4, 2])
    assert generate(model, prompts, gen_length=2, prompt_lengths=[4, 1]).shape == (2, 6)  # padding may be anything


def test_the_pipeline_refuses_it_as_training_does() -> None:
    pipe = LLaDAPipeline.from_pretrained(str(LLADA_TINY))
    records = normalized([{"instruction": f"upper: {TYPED}", "output": "A", "answer": "A"}], source="test")
    with pytest.raises(ValueError, match="holds the mask token") as training:
        encode_records(records, pipe.tokenizer, max_length=64)
    for prompt in (f"upper: {TYPED}", [{"role": "user", "content": f"upper: {TYPED}"}]):
        with pytest.raises(ValueError, match="the prompt holds the mask token") as inference:
            pipe(prompt, gen_length=2)
        assert str(inference.value).partition(" holds ")[2] == str(training.value).partition(" holds ")[2]


def test_a_likelihood_refuses_a_mask_in_a_text_and_takes_one_in_padding() -> None:
    model, _ = load_backbone(str(LLADA_TINY))
    rows = torch.tensor([[9, 8, 7, MASK], [9, MASK, 7, 5]])
    assert log_likelihood(model, rows[:1], [2], answer_lengths=[1]).isfinite().all()
    with pytest.raises(ValueError, match=r"row 1 holds the mask token \(283\)"):
        log_likelihood(model, rows, [2, 2], answer_lengths=[1, 2])
