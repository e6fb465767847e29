"""The shipped model in a LLaDA pipeline, and the answers that `generate` itself gives to the same questions."""

from __future__ import annotations

from pathlib import Path

import torch

from nara_diffusion.dllm import encode_prompts, generate, prompt_text
from nara_diffusion.dllm.evaluation.exact_match import stop_token_ids
from pipelines.llada import LLaDAPipeline

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "assets" / "llada-tiny"
FILE = str(ROOT / "pipelines" / "llada.py")
QUESTIONS = ["reverse: planet", "upper: planet", "sort: zebra"]
LENGTH = {"gen_length": 12}


def loaded_pipeline() -> LLaDAPipeline:
    loaded = LLaDAPipeline.from_pretrained(MODEL)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def batch_of(tokenizer, texts: list[str]) -> dict:
    encoded = encode_prompts(tokenizer, texts)
    lengths = [len(ids) for ids in encoded]
    rows = [ids + [0] * (max(lengths) - len(ids)) for ids in encoded]
    return {"input_ids": torch.tensor(rows), "prompt_lengths": lengths}


def by_generate(model, tokenizer, questions: list[str] = QUESTIONS, **options):
    return from_texts(model, tokenizer, [prompt_text(tokenizer, question) for question in questions], **options)


def from_texts(model, tokenizer, texts: list[str], **options):
    ends = stop_token_ids(model, tokenizer)
    return generate(model, **batch_of(tokenizer, texts), **LENGTH, eos_token_id=ends, **options)


def states(pipe: LLaDAPipeline) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
